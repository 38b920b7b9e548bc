"""The attempt fence against a model of who may write."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_run import new_attempt
from userrep.training import fence
from userrep.training.fence import (
    ATTEMPT_NAME,
    Attempt,
    StaleAttemptError,
    current_attempt,
    patiently,
    start_attempt,
    take_over,
)

EVENTS = st.tuples(st.sampled_from(["take over", "start", "write"]), st.integers(0, 2))


@given(events=st.lists(EVENTS, max_size=25))
def test_only_the_newest_attempt_of_the_job_that_has_the_run_may_write(
    events: list[tuple[str, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    owner: int | None = None
    newest: Attempt | None = None  # that may write
    started: list[Attempt] = []
    for event, number in events:
        if event == "take over":
            take_over(run_dir, f"job {number}")
            owner, newest = number, None
        elif event == "start" and number == owner:
            newest = start_attempt(run_dir, f"job {number}", lambda: f"checkpoint {len(started)}")
            assert newest.number == len(started) + 1
            assert current_attempt(run_dir, f"job {number}") == newest
            started.append(newest)
        elif event == "start":
            with pytest.raises(StaleAttemptError):
                start_attempt(run_dir, f"job {number}", lambda: None)
        for attempt in started:
            if attempt == newest:
                attempt.check()
            else:
                with pytest.raises(StaleAttemptError, match=f"attempt {attempt.number} "):
                    attempt.check()


def test_earlier_attempts_may_not_write_while_the_checkpoint_is_chosen(tmp_path: Path) -> None:
    old = new_attempt(tmp_path)

    def choose() -> str:
        with pytest.raises(StaleAttemptError):
            old.check()
        return "step-00000007-attempt-0001"

    assert start_attempt(tmp_path, old.job, choose).checkpoint == "step-00000007-attempt-0001"


def test_others_can_read_which_attempt_has_the_run(tmp_path: Path) -> None:
    new_attempt(tmp_path)
    new_attempt(tmp_path)
    assert json.loads((tmp_path / ATTEMPT_NAME).read_text())["attempt"] == 2


def test_a_damaged_file_is_no_permission(tmp_path: Path) -> None:
    attempt = new_attempt(tmp_path)
    (tmp_path / ATTEMPT_NAME).write_text("{")
    with pytest.raises(RuntimeError, match="damaged"):
        attempt.check()
    (tmp_path / ATTEMPT_NAME).unlink()
    with pytest.raises(StaleAttemptError):
        attempt.check()


def test_storage_that_comes_back_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RETRY_INTERVAL_S", 0.0)
    tries = iter([OSError("read-only"), OSError("read-only"), None])

    def write() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "written"

    assert patiently(write) == "written"


def test_storage_that_stays_away_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "RETRY_INTERVAL_S", 0.0)
    monkeypatch.setattr(fence, "STORAGE_PATIENCE_S", 0.0)

    def write() -> None:
        raise OSError("read-only")

    with pytest.raises(OSError, match="read-only"):
        patiently(write)
