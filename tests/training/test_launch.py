"""When a run is given up: attempts in a row without a new checkpoint, and none that found no room."""

from pathlib import Path

import pytest

from tests.support.tiny_run import make_state, save
from userrep.training import launch
from userrep.training.fence import FAILURES_NAME, Attempt, current_attempt, take_over
from userrep.training.launch import TrainingError
from userrep.training.ledger import read_ledger


class Workers:
    """Stands for a worker group: begins, maybe saves, and fails."""

    def __init__(self, run_dir: Path, max_failures: int) -> None:
        self.run_dir = run_dir
        take_over(run_dir, "job")
        self.starter = launch._Starter(run_dir, "job", max_failures)

    def start(self) -> Attempt:
        self.starter()
        return current_attempt(self.run_dir, "job")

    def fail(self, saves_at: int | None = None, begins: bool = True) -> None:
        attempt = self.start()
        if begins:
            attempt.begin()
            attempt.note_failure(1, ValueError("as planned"))
        if saves_at is not None:
            state = make_state()
            state.step = saves_at
            save(attempt, state)


def test_failures_in_a_row_end_the_run_and_say_why(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=2)
    for _ in range(3):
        workers.fail()
    with pytest.raises(TrainingError, match=r"3 attempts in a row .* worker 1 of attempt 3: ValueError: as planned"):
        workers.start()


def test_a_new_checkpoint_starts_the_count_again(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=1)
    for step in range(10):
        workers.fail(saves_at=step + 1)
        workers.fail()
    assert workers.start().number == 21


def test_attempts_that_found_no_room_do_not_count(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=1)
    for _ in range(5):
        workers.fail(begins=False)
    workers.fail()
    workers.fail()
    with pytest.raises(TrainingError, match="2 attempts in a row"):
        workers.start()


def test_without_a_limit_it_goes_on(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=-1)
    for _ in range(9):
        workers.fail()
    assert workers.start().number == 10


def test_a_killed_worker_leaves_no_reason(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=0)
    workers.start().begin()
    with pytest.raises(TrainingError, match="a worker was killed"):
        workers.start()


def test_a_replaced_attempt_says_nothing_more(tmp_path: Path) -> None:
    workers = Workers(tmp_path, max_failures=3)
    stale = workers.start()
    workers.start()
    stale.note_failure(0, ValueError("too late"))
    assert read_ledger(tmp_path / FAILURES_NAME) == []
