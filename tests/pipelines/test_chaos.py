"""Chaos as a whole: what is judged and summarized, the processes it owns, and five faults end to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelines.chaos import LEDGER, chaos_config, judge, run_chaos, summarize
from pipelines.chaos_rig import Rig, Session, is_alive, wait_until
from pipelines.chaos_run import HANG_LIMIT_S, Run, Strike
from pipelines.chaos_schedule import LAST_STEPS, Fault, Kind
from pipelines.chaos_verdict import Outcome
from userrep.config import ConfigError

NUM_STEPS = 3


def line(attempt: int, step: int) -> dict[str, Any]:
    return {"attempt": attempt, "step": step, "batch_hash": f"h{step}", "loss": 1.0, "time_ms": 0}


ALL_STEPS = frozenset({1, 2, 3})
UNDISTURBED = Outcome([line(1, 1), line(1, 2), line(1, 3)], ALL_STEPS, b"")
RESUMED = Outcome([line(1, 1), line(1, 2), line(2, 2), line(2, 3)], ALL_STEPS, b"")


def verdict(tmp_path: Path, kind: Kind, hit: Strike, outcome: Outcome, num_commands: int = 1) -> list[str]:
    fault = Fault(index=0, kind=kind, step=1, choice=0, place=0, bit=0, has_own_cluster=False)
    run = Run(Rig(tmp_path, tmp_path, 1), tmp_path, "", num_commands=num_commands)
    return judge(fault, hit, run, outcome, UNDISTURBED, NUM_STEPS)


def test_a_run_that_survived_passes(tmp_path: Path) -> None:
    assert verdict(tmp_path, "worker", Strike("killed"), RESUMED) == []
    assert verdict(tmp_path, "driver", Strike("killed"), RESUMED, num_commands=2) == []
    assert verdict(tmp_path, "stop", Strike("stopped", hang_s=HANG_LIMIT_S), RESUMED) == []
    assert verdict(tmp_path, "bit_flip", Strike("flipped", damaged_step=2), RESUMED) == []
    assert verdict(tmp_path, "mlflow", Strike("killed"), UNDISTURBED) == []


@pytest.mark.parametrize(
    ("kind", "hit", "outcome", "num_commands", "expected"),
    [
        ("worker", Strike(""), UNDISTURBED, 1, "found nothing to hit"),
        ("stop", Strike("stopped", hang_s=HANG_LIMIT_S + 0.1), RESUMED, 1, "became an error after"),
        ("bit_flip", Strike("flipped", damaged_step=1), RESUMED, 1, "damaged checkpoint of step 1 was restored"),
        ("mlflow", Strike("killed"), RESUMED, 1, "was interrupted"),
        ("storage", Strike("read-only"), RESUMED, 1, "was interrupted"),
        ("mlflow", Strike("killed"), UNDISTURBED, 2, "issued again"),
        ("worker", Strike("killed"), UNDISTURBED, 1, "not interrupted"),
        ("worker", Strike("killed"), RESUMED, 2, "issued again"),
        ("worker", Strike("killed"), Outcome(RESUMED.lines, ALL_STEPS, b"other"), 1, "not bit-equal"),
    ],
)
def test_what_makes_a_run_fail(
    tmp_path: Path, kind: Kind, hit: Strike, outcome: Outcome, num_commands: int, expected: str
) -> None:
    (problem,) = verdict(tmp_path, kind, hit, outcome, num_commands)
    assert expected in problem


def record(**changes: Any) -> dict[str, Any]:
    plain = {"problems": [], "commands": 1, "starts": [0], "steps_taken": 10, "steps_useful": 10}
    return {**plain, "recovery_s": 0.0, "hang_s": None, **changes}


def test_summary_counts_time_to_recover_of_interrupted_runs_alone() -> None:
    records = [
        record(),
        record(starts=[0, 5], steps_taken=12, recovery_s=10.0, commands=2),
        record(starts=[0, 5], steps_taken=18, recovery_s=30.0, hang_s=12.5, problems=["something"]),
    ]
    assert summarize(records) == {
        "runs": 3,
        "passed": 2,
        "interrupted": 2,
        "recovery_p50_s": 20.0,
        "recovery_p95_s": 29.0,
        "goodput": 0.75,
        "commands": 4,
        "longest_hang_s": 12.5,
    }
    assert summarize([record()])["recovery_p95_s"] == 0.0


def test_the_job_is_longer_than_an_epoch_and_a_fault_fits_in() -> None:
    config = chaos_config().pretrain
    assert config.validate_every + LAST_STEPS < config.num_steps
    assert config.num_steps * config.global_batch_size > 700  # users, and no user has more than one sample


@pytest.mark.parametrize(("kills", "nodes"), [(0, 1), (1, 0), (1, 4)])
def test_arguments_out_of_range_are_refused(tmp_path: Path, kills: int, nodes: int) -> None:
    with pytest.raises(ConfigError, match="at least 1 kill"):
        run_chaos(kills, 7, tmp_path, nodes)


ORPHANING = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
"""


def test_a_session_finds_and_ends_what_its_dead_parent_left(tmp_path: Path) -> None:
    session = Session(["-c", ORPHANING], dict(os.environ), tmp_path / "log", is_interactive=True)
    assert session.process.stdout is not None
    child = int(session.process.stdout.readline())
    session.process.wait()
    assert not session.is_running
    (member,) = session.members()
    assert member.pid == child
    session.kill()
    assert session.members() == []
    assert not is_alive(member)


def test_a_stopped_process_is_alive_and_other_sessions_are_left_alone(tmp_path: Path) -> None:
    waiting = "import sys; sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE)
    session = Session(["-c", waiting], dict(os.environ), tmp_path / "log", is_interactive=True)
    (member,) = session.members()
    member.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: member.status() == "stopped", 60)
    assert is_alive(member)
    session.kill()
    assert not is_alive(member)
    assert other.poll() is None
    other.communicate()


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match="holds no earlier chaos"):
        run_chaos(1, 7, tmp_path)
    assert (tmp_path / "runs").is_dir()


@pytest.mark.ray
def test_five_faults_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_chaos(5, 7, tmp_path) == 0
    undisturbed, *runs, last = map(json.loads, (tmp_path / LEDGER).read_text().splitlines())
    assert len({run["fault"]["kind"] for run in runs}) == len(runs) == 5
    assert all(run["hashes"] == undisturbed["hashes"] and not run["problems"] for run in runs)
    assert (last["verdict"], last["passed"], last["runs"]) == ("pass", 5, 5)


@pytest.mark.ray
@pytest.mark.slow
def test_a_node_that_dies_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    seed = 12  # its first fault on two nodes is the loss of one
    assert run_chaos(1, seed, tmp_path, nodes=2) == 0
    _, run, _ = map(json.loads, (tmp_path / LEDGER).read_text().splitlines())
    assert run["fault"]["kind"] == "node"
    assert len(run["starts"]) == 2
