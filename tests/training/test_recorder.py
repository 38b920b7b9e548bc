"""What rank 0 leaves in the run directory, and what an attempt that was replaced does not."""

import json
from pathlib import Path

import pytest

from tests.support.tiny_run import make_state, new_attempt, run_steps
from userrep.training.checkpoint import list_checkpoints
from userrep.training.fence import Attempt, StaleAttemptError
from userrep.training.ledger import LEDGER_NAME, read_ledger
from userrep.training.recorder import Recorder, evidence_path, write_evidence
from userrep.training.state import NonFiniteLossError, TrainState
from userrep.training.tracking import SPOOL_NAME, SpoolReader

NUM_STEPS = 5


def recorder(attempt: Attempt, start_step: int = 0) -> Recorder:
    run_dir = attempt.run_dir
    return Recorder(attempt, run_dir / "checkpoints", run_dir / SPOOL_NAME, {}, 2, start_step)


def step(state: TrainState, made: Recorder, **more: float) -> None:
    (metrics,) = run_steps(state, state.step + 1, NUM_STEPS)
    made.record(state, metrics | more)


def contents(run_dir: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_every_step_is_recorded_and_validated_ones_are_saved(tmp_path: Path) -> None:
    made, state = recorder(new_attempt(tmp_path)), make_state()
    hashes = []
    for number in range(1, NUM_STEPS + 1):
        step(state, made, **({"val/recall_at_10": 0.1} if number in (2, NUM_STEPS) else {}))
        hashes.append(state.batch_hash)
    made.finish()
    made.close()
    lines = read_ledger(tmp_path / LEDGER_NAME)
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["batch_hash"] for line in lines] == hashes
    assert len(set(hashes)) == NUM_STEPS
    points = SpoolReader(tmp_path / SPOOL_NAME).read()
    assert [point["metrics"]["train/loss"] for point in points] == [line["loss"] for line in lines]
    saved = [path.name[:13] for path in list_checkpoints(tmp_path / "checkpoints")]
    assert saved[-1] == f"step-0000000{NUM_STEPS}"
    assert len(saved) == 2


def test_an_urgent_checkpoint_does_not_wait_until_one_is_due(tmp_path: Path) -> None:
    made, state = recorder(new_attempt(tmp_path)), make_state()
    step(state, made)
    for _ in range(3):
        made.writer.wait()
        made.writer.write_s = 1e6  # none is due for days
        (metrics,) = run_steps(state, state.step + 1, NUM_STEPS)
        made.record(state, metrics, is_urgent=True)
        made.writer.wait()
        assert list_checkpoints(tmp_path / "checkpoints")[-1].name == f"step-0000000{state.step}-attempt-0001"
    made.close()


def test_a_replaced_attempt_writes_nothing_any_more(tmp_path: Path) -> None:
    made, state = recorder(new_attempt(tmp_path)), make_state()
    step(state, made)
    made.finish()
    new_attempt(tmp_path, "another job")
    before = contents(tmp_path)
    with pytest.raises(StaleAttemptError):
        step(state, made, **{"val/recall_at_10": 0.1})
    made.close()
    assert contents(tmp_path) == before


def test_a_replaced_attempt_does_not_commit_what_it_has_begun(tmp_path: Path) -> None:
    made, state = recorder(new_attempt(tmp_path)), make_state()
    run_steps(state, 1, NUM_STEPS)
    new_attempt(tmp_path, "another job")
    made.writer.save(state, {})
    with pytest.raises(StaleAttemptError):
        made.finish()
    made.close()
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_evidence_names_the_step_and_the_users(tmp_path: Path) -> None:
    state = make_state()
    state.model.token_embedding.weight.data[:] = float("nan")
    with pytest.raises(NonFiniteLossError) as caught:
        run_steps(state, 1, NUM_STEPS)
    attempt = new_attempt(tmp_path)
    write_evidence(attempt, caught.value)
    path = evidence_path(attempt, caught.value)
    assert path.name == "non-finite-step-00000000.json"
    evidence = json.loads(path.read_text())
    assert evidence["step"] == 0
    assert evidence["attempt"] == 1
    assert evidence["user_keys"] == list(range(100, 108))
    assert evidence["ranks"] == [{"loss": "nan", "grad_norm": "nan"}]
