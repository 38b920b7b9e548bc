"""Logs and checkpoints of a run in a bucket: what is there after a node is lost, and who may still write."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.tiny_run import make_state, new_attempt, run_steps, save
from userrep import objects, storage
from userrep.mirror import locate, object_name
from userrep.training import fence
from userrep.training.checkpoint import (
    CHECKPOINTS,
    DAMAGED,
    MODEL_FILE,
    latest_checkpoint,
    list_checkpoints,
    recover_checkpoint,
    restore_checkpoint,
)
from userrep.training.fence import Attempt, StaleAttemptError, last_failure
from userrep.training.ledger import LEDGER_NAME, read_ledger
from userrep.training.log_pieces import LogPieces, receive_log
from userrep.training.recorder import Recorder
from userrep.training.run_record import RunRecord
from userrep.training.state import TrainState
from userrep.training.tracking import SPOOL_NAME, SpoolReader

NUM_STEPS = 8


@pytest.fixture
def run_dir(bucket: str) -> Path:
    return locate(f"{bucket}/runs/one")


def lose_all_nodes(run_dir: Path) -> None:
    shutil.rmtree(run_dir)
    storage._refreshed.clear()


def take_steps(attempt: Attempt, state: TrainState, stop: int) -> None:
    """Rank 0 of an attempt, up to the loss of its node: the last step is in no checkpoint."""
    with storage.private(attempt.run_dir) as directory:
        own = replace(attempt, run_dir=directory)
        recorder = Recorder(own, directory / CHECKPOINTS, directory / SPOOL_NAME, {}, 2, state.step)
        recorder.writer.write_s = 1e9  # none is due for years
        for step in range(state.step + 1, stop + 1):
            (metrics,) = run_steps(state, step, NUM_STEPS)
            recorder.record(state, metrics | ({"val/recall_at_10": 0.1} if step % 2 == 1 else {}))
            recorder.writer.wait()
        recorder.close()


def test_pieces_make_the_file_whoever_reads_when(bucket: str) -> None:
    log = locate(f"{bucket}/log.jsonl")
    with storage.private(log.parent) as own:
        mine = own / log.name
        mine.write_text("one\n")
        pieces = LogPieces(mine, 1)
        pieces.send()
        assert not log.exists(), "what was there is not sent again"
        pieces = LogPieces(own / "absent", 1)
        pieces.send()
        mine.unlink()
        pieces = LogPieces(mine, 1)
        read = []
        for content in ("one\n", "two\n", "three\n"):
            with mine.open("a") as stream:
                stream.write(content)
            pieces.send()
            pieces.send()
            receive_log(log)
            read.append(log.read_text())
        assert read == ["one\n", "one\ntwo\n", "one\ntwo\nthree\n"]
    # The upload of a piece was not confirmed, and it was sent again with more.
    name = object_name(log)
    objects.write_object(f"{name}.pieces/{2:06d}-{14:015d}", b"four\n")
    receive_log(log)
    objects.write_object(f"{name}.pieces/{2:06d}-{14:015d}", b"four\nfive\n")
    receive_log(log)
    assert log.read_text() == "one\ntwo\nthree\nfour\nfive\n"
    log.unlink()
    receive_log(log)
    assert log.read_text() == "one\ntwo\nthree\nfour\nfive\n"


def test_a_run_goes_on_on_another_node_as_if_nothing_had_happened(run_dir: Path) -> None:
    expected = make_state()
    hashes = []
    for step in range(1, NUM_STEPS + 1):
        run_steps(expected, step, NUM_STEPS)
        hashes.append(expected.batch_hash)
    take_steps(new_attempt(run_dir), make_state(), 6)
    lose_all_nodes(run_dir)
    state, attempt = make_state(), new_attempt(run_dir)
    assert attempt.number == 2
    checkpoint = recover_checkpoint(run_dir / CHECKPOINTS)
    assert checkpoint is not None
    restore_checkpoint(checkpoint, state)
    assert state.step == 5
    take_steps(attempt, state, NUM_STEPS - 1)
    assert state.batch_hash == hashes[NUM_STEPS - 2]
    receive_log(run_dir / LEDGER_NAME)
    receive_log(run_dir / SPOOL_NAME)
    lines = read_ledger(run_dir / LEDGER_NAME)
    assert [(line["attempt"], line["step"]) for line in lines] == [*((1, s) for s in range(1, 6)), (2, 6), (2, 7)]
    assert [line["batch_hash"] for line in lines] == hashes[: NUM_STEPS - 1]
    assert [point["step"] for point in SpoolReader(run_dir / SPOOL_NAME).read()] == list(range(1, NUM_STEPS))
    assert len(list_checkpoints(run_dir / CHECKPOINTS)) <= 3, "the newest two and the best"


def test_an_attempt_that_was_replaced_commits_nothing(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, state = new_attempt(run_dir), make_state()
    run_steps(state, 1, NUM_STEPS)
    save(old, state)
    upload = objects.upload_all

    def replaced_meanwhile(pairs: list[tuple[Path, str]]) -> None:
        upload(pairs)
        if state.step == 2:
            monkeypatch.setattr(objects, "upload_all", upload)
            new_attempt(run_dir, "another job")

    monkeypatch.setattr(objects, "upload_all", replaced_meanwhile)
    run_steps(state, 2, NUM_STEPS)
    with pytest.raises(StaleAttemptError, match="at the run in s3://"):
        save(old, state)
    (only,) = list_checkpoints(run_dir / CHECKPOINTS)
    assert only.name.startswith("step-00000001")
    assert recover_checkpoint(run_dir / CHECKPOINTS) == only
    assert len(storage.directories(run_dir / CHECKPOINTS, "step-*")) == 1, "what was not committed is removed"
    with storage.private(run_dir) as directory:
        monkeypatch.setattr(fence.storage, "refresh", lambda path, max_age_s: None)
        with pytest.raises(StaleAttemptError):
            replace(old, run_dir=directory).check()


def test_a_damaged_checkpoint_is_put_aside_in_the_bucket(run_dir: Path) -> None:
    attempt, state = new_attempt(run_dir), make_state()
    for step in (1, 2):
        run_steps(state, step, NUM_STEPS)
        save(attempt, state)
    older, newer = list_checkpoints(run_dir / CHECKPOINTS)
    objects.write_object(f"{object_name(newer)}/{MODEL_FILE}", b"damaged")
    lose_all_nodes(run_dir)
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_checkpoint(run_dir / CHECKPOINTS) == older
    with pytest.warns(UserWarning, match="passed over"):
        assert recover_checkpoint(run_dir / CHECKPOINTS) == older
    assert list_checkpoints(run_dir / CHECKPOINTS) == [older]
    (aside,) = storage.directories(run_dir / CHECKPOINTS, f"{DAMAGED}*")
    assert objects.read_object(f"{object_name(aside)}/{MODEL_FILE}") == b"damaged"


def test_failures_and_records_are_read_on_any_node(run_dir: Path) -> None:
    attempt = new_attempt(run_dir)
    attempt.begin()
    attempt.note_failure(3, RuntimeError("first"))
    record = RunRecord.start(run_dir, "experiment", {"a": 1})
    lose_all_nodes(run_dir)
    attempt.note_failure(1, RuntimeError("second"))
    assert "first" in last_failure(run_dir)
    assert RunRecord.read(run_dir) == record
    assert RunRecord.start(run_dir, "experiment", {"a": 1}).key == record.key
    assert attempt.end() is True
    assert attempt.end() is False
