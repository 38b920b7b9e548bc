"""What must hold before a run starts: each check refuses a run that cannot fit, with the numbers."""

import math
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from userrep import storage
from userrep.config import ConfigError
from userrep.manifest import IncompleteTableError
from userrep.mirror import shown

MIB = 2**20
PROCESS_BYTES = 700 * MIB  # of a worker before it has a model: torch, Ray, MLflow (resident memory, measured)
STATE_BYTES = 12  # of a parameter in a checkpoint, and in its copy in rank 0: weight and two moments, float32
STEP_BYTES = STATE_BYTES + 4  # of a parameter in every worker: the same and its gradient
MIN_BUDGET_MIB = 64  # what the setting allows
PROBE_TIMEOUT_S = 120  # a node may have to start a process first
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as a process on it sees it.

    Attributes:
        name: address.
        num_cpus: that Ray gives away there.
        memory_bytes: of the machine, or of the container where that has less.
        blind_to: those of the sources that cannot be read there.
        is_shared: whether the run directory is the driver's, and can be written to.
    """

    name: str
    num_cpus: float
    memory_bytes: int
    blind_to: tuple[Path, ...]
    is_shared: bool


def reserve_cpus(num_workers: int, node_cpus: list[float]) -> tuple[float, str]:
    """How to place workers so that one node keeps a whole CPU, without which no task of Ray Data could ever start.

    Args:
        num_workers: the most that there may be.
        node_cpus: of each node.

    Returns:
        CPUs to reserve for each worker, 1 / k for the smallest k that will do, and Ray's placement strategy: spread
        over the nodes where that leaves a CPU, else packed.

    Raises:
        ConfigError: the cluster has no CPU for Ray Data.
    """
    total = sum(node_cpus)
    if total < 2:
        raise ConfigError(f"the Ray cluster has {total:g} CPU, and training and its input need one each: give it 2")
    cpus = 1 / math.ceil(num_workers / (total - 1))
    left = num_workers
    for place, free in enumerate(sorted(node_cpus)[:-1]):
        left -= min(math.floor(free / cpus + 1e-9), left // (len(node_cpus) - place))
    # What is left is what the largest node gets at the most: smaller ones may be full before they have an equal share.
    return cpus, "SPREAD" if max(node_cpus) - left * cpus >= 1 - 1e-9 else "PACK"


def check_gpus(num_workers: int, num_gpus: float, use_gpu: bool) -> None:
    """Refuses a run that would wait for GPUs for ever.

    Raises:
        ConfigError: with the number of GPUs that there are.
    """
    if use_gpu and num_gpus < num_workers:
        raise ConfigError(
            f"workers.use_gpu=true with {num_workers} workers, and the Ray cluster has {num_gpus:g} GPUs: "
            "use fewer workers, or workers.use_gpu=false"
        )


def check_memory(num_parameters: int, budget_mib: int, num_workers: int, nodes: list[Node], is_on_gpu: bool) -> None:
    """Refuses a run whose workers cannot be placed on the nodes without running out of memory.

    Args:
        num_parameters: of the model.
        budget_mib: for the activations of a worker.
        num_workers: the fewest that there may be.
        nodes: of the cluster.
        is_on_gpu: activations are not in the nodes' memory.

    Raises:
        ConfigError: with what a worker needs, what the nodes have, and the largest budget that fits.
    """
    fixed = PROCESS_BYTES + STEP_BYTES * num_parameters
    budget = 0 if is_on_gpu else budget_mib * MIB
    copy = STATE_BYTES * num_parameters  # of rank 0
    if _places(nodes, fixed + budget, copy) >= num_workers:
        return
    largest = next(
        (
            mib
            for mib in range(budget_mib, MIN_BUDGET_MIB - 1, -1)
            if _places(nodes, fixed + mib * MIB, copy) >= num_workers
        ),
        0,
    )
    advice = f"set workers.memory.budget_mib={largest} or less" if largest and not is_on_gpu else "take larger nodes"
    have = ", ".join(f"{node.name} {node.memory_bytes / MIB:,.0f}" for node in nodes)
    raise ConfigError(
        f"{num_workers} workers do not fit into memory: each needs {(fixed + budget) / MIB:,.0f} MiB "
        f"({PROCESS_BYTES / MIB:,.0f} for the process, {STEP_BYTES * num_parameters / MIB:,.0f} for {num_parameters:,} "
        f"parameters with gradients and optimizer, {budget / MIB:,.0f} for activations), the first one "
        f"{copy / MIB:,.0f} more for checkpoints; the nodes have (MiB): {have}. Use fewer workers, or {advice}"
    )


def check_disk(num_parameters: int, keep: int, run_dir: Path) -> None:
    """Refuses a run whose checkpoints do not fit on the disk.

    Args:
        num_parameters: of the model.
        keep: newest checkpoints that are retained; there are also the best one and the one that is being written.
        run_dir: on the disk.

    Raises:
        ConfigError: with what is needed and what is free.
    """
    needed, free = STATE_BYTES * num_parameters * (keep + 2), shutil.disk_usage(run_dir).free
    if needed > free:
        raise ConfigError(
            f"{run_dir} has {free / MIB:,.0f} MiB free, and {keep + 2} checkpoints of {num_parameters:,} parameters "
            f"need {needed / MIB:,.0f}: free some space, or choose another --workdir"
        )


def check_storage(run_dir: Path, sources: tuple[Path, ...], nodes: list[Node]) -> None:
    """Refuses a run whose files are not the same on every node.

    Raises:
        ConfigError: names the nodes.
    """
    readers = [(path, [node.name for node in nodes if path in node.blind_to]) for path in sources]
    for path, blind in [*readers, (run_dir, [node.name for node in nodes if not node.is_shared])]:
        if blind:
            raise ConfigError(
                f"{shown(path)} is not shared: {', '.join(blind)} of {len(nodes)} nodes cannot read it or write to it; "
                "it has to be on storage that all nodes mount under the same path, or s3:// with credentials in the "
                "environment of every node (--workdir, pretrain.mix)"
            )


def inspect_nodes(run_dir: Path, sources: tuple[Path, ...]) -> list[Node]:
    """Looks at every node that may hold a worker, from a process on it; this machine is looked at from here.

    Args:
        run_dir: is made if it is not there.
        sources: directories of tokenized shards.

    Raises:
        ConfigError: this process cannot write to the run directory, or a node does not answer.
    """
    token = run_dir / f".preflight-{uuid.uuid4().hex}"
    here = ray.get_runtime_context().get_node_id()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        token.write_text(here)
        storage.send(run_dir, token.name)
    except OSError as error:
        raise ConfigError(f"{shown(run_dir)} cannot be written to ({error}); choose another --workdir") from error
    try:
        alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        probe = ray.remote(num_cpus=0)(_look)
        answers = [
            ray.put(_look(token, sources))
            if node["NodeID"] == here
            else probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                token, sources
            )
            for node in alive
        ]
        facts = ray.get(answers, timeout=PROBE_TIMEOUT_S)
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise ConfigError(f"a node of the cluster does not answer: {str(error).splitlines()[0]}") from error
    finally:
        storage.receive(run_dir, f"{token.name}*")
        marks = {path.name for path in run_dir.glob(f"{token.name}*")}
        for mark in marks:
            storage.remove(run_dir / mark)
    return [
        Node(
            name=node["NodeManagerAddress"],
            num_cpus=node["Resources"]["CPU"],
            memory_bytes=memory_bytes,
            blind_to=blind_to,
            is_shared=mark in marks,
        )
        for node, (memory_bytes, blind_to, mark) in zip(alive, facts, strict=True)
    ]


def _look(token: Path, sources: tuple[Path, ...]) -> tuple[int, tuple[Path, ...], str]:
    """Memory of this node, the sources that it cannot read, and the name of the mark that it left beside the token."""
    mark, left = "", token.with_name(f"{token.name}-{uuid.uuid4().hex}")
    with suppress(OSError):
        storage.refresh(token)
        if token.is_file():
            left.touch()
            storage.send(left.parent, left.name)
            mark = left.name
    return memory_limit(), tuple(path for path in sources if not _can_read(path)), mark


def _can_read(table: Path) -> bool:
    try:
        storage.manifest_of(table)
    except (OSError, IncompleteTableError):
        return False
    return True


def memory_limit() -> int:
    """Bytes of memory that processes of this machine or container may use."""
    limits = [int(text) for path in CGROUP_LIMITS if path.is_file() and (text := path.read_text().strip()).isdigit()]
    return min([psutil.virtual_memory().total, *limits])


def _places(nodes: list[Node], worker_bytes: int, copy_bytes: int) -> int:
    """Most workers that fit, one of which, rank 0, needs `copy_bytes` more."""
    room = [node.memory_bytes for node in nodes]
    total = sum(size // worker_bytes for size in room)
    firsts = [size for size in room if size >= worker_bytes + copy_bytes]
    return max((total - size // worker_bytes + (size - copy_bytes) // worker_bytes for size in firsts), default=0)
