"""What is refused before a run starts, and with which numbers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.config import ConfigError
from userrep.training import preflight
from userrep.training.preflight import (
    MIB,
    PROCESS_BYTES,
    STATE_BYTES,
    STEP_BYTES,
    Node,
    check_disk,
    check_gpus,
    check_memory,
    check_storage,
    inspect_nodes,
    memory_limit,
    reserve_cpus,
)


def node(name: str, memory_mib: int = 8192, blind_to: tuple[Path, ...] = (), is_shared: bool = True) -> Node:
    return Node(name, 2.0, memory_mib * MIB, blind_to, is_shared)


def place(num_workers: int, cpus: float, strategy: str, free: list[float]) -> list[float]:
    """What Ray leaves on the nodes: packed, it fills one after another; spread, it takes that with fewest workers."""
    left, used = list(free), [0] * len(free)
    for _ in range(num_workers):
        fitting = [node for node, room in enumerate(left) if room >= cpus - 1e-9]
        key = (lambda node: -used[node]) if strategy == "PACK" else (lambda node: used[node])
        chosen = min(fitting, key=key)
        left[chosen] -= cpus
        used[chosen] += 1
    return left


@given(num_workers=st.integers(1, 40), free=st.lists(st.integers(1, 16).map(float), min_size=1, max_size=5))
def test_a_node_keeps_a_whole_cpu_for_the_input(num_workers: int, free: list[float]) -> None:
    if sum(free) < 2:
        with pytest.raises(ConfigError, match="has 1 CPU"):
            reserve_cpus(num_workers, free)
        return
    cpus, strategy = reserve_cpus(num_workers, free)
    assert 0 < cpus <= 1
    assert max(place(num_workers, cpus, strategy, free)) >= 1 - 1e-9


def test_workers_are_spread_where_there_is_room() -> None:
    assert reserve_cpus(4, [16.0] * 4) == (1.0, "SPREAD")
    assert reserve_cpus(8, [2.0] * 4) == (0.5, "SPREAD")
    assert reserve_cpus(2, [2.0]) == (0.5, "SPREAD")
    assert reserve_cpus(26, [2.0, 3.0, 3.0]) == (0.25, "PACK")  # the small node is full before it has an equal share
    assert reserve_cpus(6, [2.0, 2.0]) == (0.5, "PACK")  # spread, two nodes would have half a CPU each


def test_missing_gpus_are_an_error() -> None:
    check_gpus(2, 2, use_gpu=True)
    check_gpus(2, 0, use_gpu=False)
    with pytest.raises(ConfigError, match="2 workers, and the Ray cluster has 1 GPUs"):
        check_gpus(2, 1, use_gpu=True)


@given(
    num_parameters=st.integers(1, 10**8),
    num_workers=st.integers(1, 6),
    sizes=st.lists(st.integers(500, 20_000), min_size=1, max_size=3),
)
def test_the_budget_that_the_refusal_names_is_the_largest_that_fits(
    num_parameters: int, num_workers: int, sizes: list[int]
) -> None:
    nodes = [node(str(number), size) for number, size in enumerate(sizes)]

    def fits(budget_mib: int) -> bool:
        """Tries every node for the first worker, which needs more."""
        need = PROCESS_BYTES + STEP_BYTES * num_parameters + budget_mib * MIB
        counts = []
        for first in range(len(nodes)):
            room = [n.memory_bytes - (number == first) * STATE_BYTES * num_parameters for number, n in enumerate(nodes)]
            if room[first] >= need:
                counts.append(sum(max(0, size) // need for size in room))
        return max(counts, default=0) >= num_workers

    try:
        check_memory(num_parameters, 4096, num_workers, nodes, is_on_gpu=False)
    except ConfigError as error:
        assert not fits(4096)
        if "budget_mib=" in str(error):
            named = int(str(error).split("budget_mib=")[1].split()[0])
            assert fits(named)
            assert not fits(named + 1)
        else:
            assert not fits(64)
    else:
        assert fits(4096)


def test_the_refusal_says_what_is_needed_and_what_there_is() -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(50_000_000, 4096, 2, [node("10.0.0.7")], is_on_gpu=False)
    for number in ("2 workers", "50,000,000", "5,559", "763", "4,096", "572", "10.0.0.7 8,192", "budget_mib=2346"):
        assert number in str(caught.value)


def test_checkpoints_must_fit_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 48 * MIB})())
    check_disk(MIB, 2, tmp_path)
    with pytest.raises(ConfigError, match="48 MiB free, and 5 checkpoints of 1,048,576 parameters need 60"):
        check_disk(MIB, 3, tmp_path)


def test_storage_that_nodes_do_not_share_is_refused() -> None:
    run_dir, sources = Path("run"), (Path("shards"), Path("others"))
    nodes = [node("a"), node("b", blind_to=sources[1:]), node("c", is_shared=False), node("d", is_shared=False)]
    with pytest.raises(ConfigError, match="others is not shared: b of 4 nodes"):
        check_storage(run_dir, sources, nodes)
    nodes.pop(1)
    with pytest.raises(ConfigError, match="run is not shared: c, d of 3 nodes"):
        check_storage(run_dir, sources, nodes)
    check_storage(run_dir, sources, nodes[:1])


def test_a_container_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory_limit()
    for text, expected in (("max\n", machine), ("1048576\n", 1048576), (f"{2**63}\n", machine)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(preflight, "CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "absent"))
        assert memory_limit() == expected
        monkeypatch.undo()


def test_what_another_node_sees(tmp_path: Path) -> None:
    token = tmp_path / "here" / "token"
    token.parent.mkdir()
    token.touch()
    _, blind_to, mark = preflight._look(token, (tmp_path / "shards",))
    assert blind_to == (tmp_path / "shards",)
    assert (tmp_path / "here" / mark).is_file()
    _, _, mark = preflight._look(tmp_path / "elsewhere" / "token", ())  # the path means another disk
    assert mark == ""


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_this_node_is_looked_at_and_nothing_is_left_behind(tmp_path: Path) -> None:
    (found,) = inspect_nodes(tmp_path / "run", (tmp_path,))
    assert found.num_cpus == 2
    assert found.memory_bytes == memory_limit()
    assert found.is_shared
    assert found.blind_to == (tmp_path,)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written to"):
        inspect_nodes(tmp_path / "file" / "run", (tmp_path,))
