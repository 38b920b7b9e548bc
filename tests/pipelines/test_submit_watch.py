"""The end of a job, and its log across broken connections."""

from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus

from pipelines import submit_watch
from pipelines.submit_watch import exit_code, follow, wait
from tests.pipelines.job_client import FakeClient, details, server_of
from userrep.config import ConfigError


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_watch, "POLL_INTERVAL_S", 0.0)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, None, 1),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.STOPPED, None, 1),
        (JobStatus.STOPPED, 0, 1),
        (JobStatus.STOPPED, -15, 143),
    ],
)
def test_exit_codes(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_code(details("a", status, driver_exit_code=code)) == expected


class Flaky(FakeClient):
    """Answers `states` one by one; the last one again and again."""

    def __init__(self, *states: JobDetails | Exception) -> None:
        super().__init__()
        self.states = list(states)

    def get_job_info(self, submission_id: str) -> JobDetails:
        state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        if isinstance(state, Exception):
            raise state
        return state


RUNNING, DONE = details("a", JobStatus.RUNNING), details("a", JobStatus.SUCCEEDED)
LOST = ConnectionError("reset")


def test_waiting_survives_a_server_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wait(server_of(Flaky(RUNNING, LOST, LOST, RUNNING, DONE)), "a") == 0
    monkeypatch.setattr(submit_watch, "PATIENCE_S", -1.0)
    with pytest.raises(RuntimeError, match="no job server answers"):
        wait(server_of(Flaky(RUNNING, LOST, DONE)), "a")


def test_waiting_ends_with_a_limit_and_with_a_job_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="is RUNNING after -1 s"):
        wait(server_of(Flaky(RUNNING)), "a", limit_s=-1.0)
    with pytest.raises(ConfigError, match="has no job a"):
        wait(server_of(FakeClient()), "a")


def shown(client: FakeClient) -> str:
    texts: list[str] = []
    assert follow(server_of(client), "a", texts.append) == 0
    return "".join(texts)


@pytest.mark.parametrize(
    "pieces",
    [
        [["ab\n", "cd\n", "ef\n"]],
        [["ab\n"], ["ab\n", "cd\n", "ef\n"]],
        [["ab\nc", LOST], ["ab\n", "cd\nef", LOST], ["ab\ncd\nef\n"]],
        [[LOST], ["ab\n", LOST], [LOST], ["ab\n", "cd\n"]],
        [[]],
    ],
)
def test_every_line_is_shown_once(pieces: list[list[Any]]) -> None:
    broken = sum(LOST in stream for stream in pieces)
    client = Flaky(*[RUNNING] * (len(pieces) - broken - 1), DONE)
    client.pieces, client.logs = pieces, {"a": "ab\ncd\nef\n"}
    client.known["a"] = DONE
    assert shown(client) == "ab\ncd\nef\n"


def test_following_gives_up_when_nothing_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_watch, "PATIENCE_S", -1.0)
    client = Flaky(RUNNING)
    client.pieces = [[LOST]]
    with pytest.raises(RuntimeError, match="no job server answers"):
        follow(server_of(client), "a", lambda text: None)
