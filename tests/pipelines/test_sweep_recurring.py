"""A recurring sweep: named by its day, compared with the last finished one, and a pointer that only moves forward."""

import itertools
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipelines import sweep_recurring
from pipelines.sweep_recurring import (
    FIT,
    RecurringSweep,
    latest_finished,
    main,
    move_pointer,
    run_recurring,
    sweep_command,
    sweep_name,
)

SUNDAY_NIGHT = datetime(2026, 11, 22, 18, 30, tzinfo=UTC)


def make_sweep(root: Path, name: str, is_finished: bool = True) -> Path:
    (root / name / "report").mkdir(parents=True)
    if is_finished:
        (root / name / FIT).write_text("{}")
    return root / name


def value_of(command: Sequence[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command else None


def test_latest_finished(tmp_path: Path) -> None:
    assert latest_finished(tmp_path / "none") is None
    assert latest_finished(tmp_path) is None
    newest = make_sweep(tmp_path, "2026-11-16")
    older = make_sweep(tmp_path, "2026-11-09")
    make_sweep(tmp_path, "2026-11-23", is_finished=False)
    make_sweep(tmp_path, "scratch-9999")
    (tmp_path / "latest").symlink_to("2026-11-09")
    assert latest_finished(tmp_path) == newest
    assert latest_finished(tmp_path, before="2026-11-16") == older
    assert latest_finished(tmp_path, before="2026-11-09") is None


def test_names_are_in_the_order_of_time() -> None:
    days = [datetime(2026, 12, 28), datetime(2027, 1, 4), datetime(2027, 11, 1)]
    assert sorted(map(sweep_name, days)) == [sweep_name(day) for day in days]


def test_pointer_moves_and_leaves_nothing_else(tmp_path: Path) -> None:
    first, second = make_sweep(tmp_path, "2026-11-09"), make_sweep(tmp_path, "2026-11-16")
    for sweep in (first, second, second):
        pointer = move_pointer(tmp_path, sweep)
        assert pointer.resolve() == sweep.resolve()
    assert {path.name for path in tmp_path.iterdir()} == {first.name, second.name, "latest"}
    moved = tmp_path.rename(tmp_path.with_name("elsewhere"))
    assert (moved / "latest" / FIT).read_text() == "{}"


def test_pointer_overwrites_no_directory(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path, "2026-11-09")
    (tmp_path / "latest").mkdir()
    with pytest.raises(ValueError, match="latest is not a link; move it away"):
        move_pointer(tmp_path, sweep)


def test_pointer_is_never_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = make_sweep(tmp_path, "2026-11-09"), make_sweep(tmp_path, "2026-11-16")
    move_pointer(tmp_path, first)

    def die(*_: object) -> None:
        raise OSError("killed here")

    monkeypatch.setattr(sweep_recurring.os, "replace", die)
    with pytest.raises(OSError, match="killed here"):
        move_pointer(tmp_path, second)
    assert (tmp_path / "latest").resolve() == first.resolve()
    monkeypatch.undo()
    move_pointer(tmp_path, second)  # what the killed one left is in nobody's way
    assert (tmp_path / "latest").resolve() == second.resolve()


def test_command_carries_the_date() -> None:
    request = RecurringSweep(config="weekly", root="/s", data="/raw/{date}", overrides=("a=1", "b={date}"), max_hours=6)
    command = sweep_command(request.with_overrides(["flops_per_s=2.5e+14"]), "2026-11-23", None)
    assert command[:5] == [sys.executable, "-m", "pipelines.cli", "sweep", "run"]
    assert value_of(command, "--workdir") == "/s/2026-11-23"
    assert value_of(command, "--data") == "/raw/2026-11-23"
    assert value_of(command, "--max-hours") == "6"
    assert float(value_of(command, "--flops-per-s") or 0) == 2.5e14
    assert "--flops-per-s" not in sweep_command(request, "2026-11-23", None)
    assert [b for a, b in itertools.pairwise(command) if a == "--set"] == ["a=1", "b=2026-11-23"]
    assert "--compare-with" not in command


def test_runs_week_after_week(tmp_path: Path) -> None:
    root, commands = tmp_path / "sweeps", []
    request = RecurringSweep(config="weekly", root=str(root), time_zone="Asia/Seoul")

    def call(command: Sequence[str]) -> int:
        commands.append(command)
        make_sweep(root, Path(value_of(command, "--workdir") or "").name)
        return 0

    assert run_recurring(request, SUNDAY_NIGHT, call) == 0
    assert run_recurring(request, SUNDAY_NIGHT.replace(day=29), call) == 0
    # Monday in Seoul; nothing to compare the first one with.
    assert [value_of(command, "--workdir") for command in commands] == [
        str(root / "2026-11-23"),
        str(root / "2026-11-30"),
    ]
    assert [value_of(command, "--compare-with") for command in commands] == [None, str(root / "2026-11-23")]
    assert (root / "latest").resolve().name == "2026-11-30"


def test_a_rerun_is_not_compared_with_itself_and_the_pointer_goes_not_back(tmp_path: Path) -> None:
    for name in ("2026-11-15", "2026-11-22", "2026-11-29"):
        make_sweep(tmp_path, name)
    commands: list[Sequence[str]] = []
    request = RecurringSweep(config="weekly", root=str(tmp_path))
    run_recurring(request, SUNDAY_NIGHT, lambda command: commands.append(command) or 0)
    assert value_of(commands[0], "--compare-with") == str(tmp_path / "2026-11-15")
    assert (tmp_path / "latest").resolve().name == "2026-11-29"


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_failure_moves_no_pointer(tmp_path: Path, is_finished: bool) -> None:
    move_pointer(tmp_path, make_sweep(tmp_path, "2026-11-15"))

    def call(_: Sequence[str]) -> int:
        make_sweep(tmp_path, "2026-11-22", is_finished)
        return 3

    assert run_recurring(RecurringSweep(config="weekly", root=str(tmp_path)), SUNDAY_NIGHT, call) == 3
    assert (tmp_path / "latest").resolve().name == "2026-11-15"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"root": "sweeps"}, "absolute path"),
        ({"root": "s3://bucket/sweeps"}, "mount the bucket"),
        ({"root": "/s", "time_zone": "Asia/Seul"}, "'Asia/Seul' is not known here; allowed: IANA names"),
        ({"root": "/s", "time_zone": "../etc/passwd"}, "is not known here"),
        ({"root": "/s", "max_hours": 0}, "greater than 0"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecurringSweep.parse({"config": "weekly", **values})


def test_main_reads_its_request(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    monkeypatch.setattr(sweep_recurring, "run_recurring", lambda request, _: seen.append(request.config) or 0)
    text = json.dumps({"config": "argument", "root": "/s"})
    monkeypatch.setenv(sweep_recurring.REQUEST_VARIABLE, text.replace("argument", "variable"))
    assert (main([text]), main([])) == (0, 0)
    assert seen == ["argument", "variable"]
    assert main(["{}"]) == 1
    assert "config" in capsys.readouterr().err
