"""Checkpoints behind the steps, with a storage that can be held up and a clock that can be set."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.support.tiny_run import make_state, new_attempt, run_steps, weights
from userrep.training import fence
from userrep.training.checkpoint import list_checkpoints, restore_checkpoint
from userrep.training.checkpoint_writer import MAX_SHARE, CheckpointWriter
from userrep.training.fence import StaleAttemptError

RECALL = {"val/recall_at_10": 0.5}
LIMIT_S = 60  # of waiting for another thread: beyond it the test has failed


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def writer(
    run_dir: Path, before_commit: Callable[[], None] = lambda: None, clock: Clock | None = None
) -> Iterator[CheckpointWriter]:
    attempt = new_attempt(run_dir)
    made = CheckpointWriter(run_dir / "checkpoints", {}, 2, attempt, before_commit, clock or Clock())
    try:
        yield made
    finally:
        made.close()


def fail() -> None:
    raise OSError("read-only")


def test_what_is_saved_is_the_state_at_the_time_of_the_call(tmp_path: Path) -> None:
    may_write = threading.Event()
    state = make_state(torch.float32)
    run_steps(state, 1, 4)
    expected = weights(state)
    with writer(tmp_path, lambda: None if may_write.wait(LIMIT_S) else fail()) as made:
        made.save(state, RECALL)
        run_steps(state, 3, 4)  # the steps go on while nothing is on disk yet
        assert list_checkpoints(tmp_path / "checkpoints") == []
        assert not made.is_due()
        made.poll()
        may_write.set()
        made.wait()
        made.save(state, RECALL)
        made.wait()
    first, second = list_checkpoints(tmp_path / "checkpoints")
    for checkpoint, weights_then in ((first, expected), (second, weights(state))):
        restored = make_state(torch.float32)
        restore_checkpoint(checkpoint, restored)
        for name, value in weights(restored).items():
            assert torch.equal(value, weights_then[name]), name
    assert [path.name[:13] for path in (first, second)] == ["step-00000001", "step-00000003"]


def test_one_at_a_time(tmp_path: Path) -> None:
    directory, committed = tmp_path / "checkpoints", []

    def look() -> None:
        committed.append([path.name[:13] for path in list_checkpoints(directory)][-1:])

    state = make_state()
    with writer(tmp_path, look) as made:
        for state.step in range(20):
            made.save(state, RECALL)
        made.wait()
    assert committed == [[], *([f"step-{step:08d}"] for step in range(19))]  # each began when the last one was whole


@pytest.mark.parametrize("how", ["poll", "save", "wait"])
def test_a_failure_comes_up_at_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(fence, "STORAGE_PATIENCE_S", 0.0)
    monkeypatch.setattr(fence, "RETRY_INTERVAL_S", 0.0)
    state = make_state()
    with writer(tmp_path, fail) as made:
        made.save(state, RECALL)
        assert made._pending is not None
        assert isinstance(made._pending.exception(LIMIT_S), OSError)
        with pytest.raises(OSError, match="read-only"):
            made.save(state, RECALL) if how == "save" else getattr(made, how)()
        made.poll()  # it is told once
    assert list_checkpoints(tmp_path / "checkpoints") == []


def test_a_short_outage_delays_the_checkpoint_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RETRY_INTERVAL_S", 0.0)
    outage = iter([fail, fail, lambda: None])
    with writer(tmp_path, lambda: next(outage)()) as made:
        made.save(make_state(), RECALL)
        made.wait()
    assert len(list_checkpoints(tmp_path / "checkpoints")) == 1


def test_an_outage_is_no_reason_to_save_less_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RETRY_INTERVAL_S", 0.0)
    clock, outage = Clock(), iter([10.0, 10.0, 0.5])

    def take() -> None:
        seconds = next(outage)
        clock.now += seconds
        if seconds > 1:
            fail()

    with writer(tmp_path, take, clock) as made:
        made.save(make_state(), RECALL)
        made.wait()
        assert made.write_s == 0.5


def test_what_is_urgent_is_saved_unless_a_checkpoint_is_on_its_way(tmp_path: Path) -> None:
    may_write = threading.Event()
    with writer(tmp_path, lambda: None if may_write.wait(LIMIT_S) else fail()) as made:
        assert made.is_due(is_urgent=True)
        made.save(make_state(), RECALL)
        assert not made.is_due(is_urgent=True)
        may_write.set()
        made.wait()
        made.write_s = 1.0
        assert made.is_due(is_urgent=True)
        assert not made.is_due()


def test_a_replaced_attempt_is_told(tmp_path: Path) -> None:
    with writer(tmp_path) as made:
        new_attempt(tmp_path, "another job")
        made.save(make_state(), RECALL)
        with pytest.raises(StaleAttemptError):
            made.wait()


def test_checkpoints_take_a_small_share_of_the_time(tmp_path: Path) -> None:
    clock, state = Clock(), make_state()

    def take_three_seconds() -> None:
        clock.now += 3.0

    with writer(tmp_path, take_three_seconds, clock) as made:
        saved_at = []
        assert made.is_due()  # the first one tells what they cost
        for _ in range(1000):
            if made.is_due():
                saved_at.append(clock.now)
                made.save(state, RECALL)
                made.wait()
            clock.now += 1.0
        assert made.write_s == 3.0
    assert len(saved_at) > 5
    for before, after in zip(saved_at, saved_at[1:], strict=False):
        assert 3.0 / MAX_SHARE <= after - before <= 3.0 / MAX_SHARE + 1


def test_memory_is_used_again(tmp_path: Path) -> None:
    state = make_state(torch.float32)
    run_steps(state, 1, 4)
    with writer(tmp_path) as made:
        made.save(state, RECALL)
        assert made._snapshot is not None
        before = {name: value.data_ptr() for name, value in made._snapshot.model.items()}
        run_steps(state, 2, 4)
        made.save(state, RECALL)
        assert {name: value.data_ptr() for name, value in made._snapshot.model.items()} == before
