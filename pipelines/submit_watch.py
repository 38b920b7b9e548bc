"""Waits for a job, shows its log, and says how it ended."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing

from ray.job_submission import JobDetails, JobStatus

from pipelines.job_server import JobServer
from userrep.config import ConfigError

POLL_INTERVAL_S = 1.0
PATIENCE_S = 120.0  # without an answer; assumption: a head that is replaced or overloaded is back by then


def exit_code(job: JobDetails) -> int:
    """Exit code of a job that has ended, as a shell would give it; 1 where its command never ran."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code
    return 128 - code if code is not None and code < 0 else code or 1


def wait(server: JobServer, submission_id: str, limit_s: float | None = None) -> int:
    """Waits for the end of a job.

    Args:
        server: that has the job.
        submission_id: of the job.
        limit_s: how long at the most; None: as long as it takes.

    Returns:
        Its exit code.

    Raises:
        RuntimeError: the server stopped answering, or the limit is over.
    """
    deadline = None if limit_s is None else time.monotonic() + limit_s
    answered = time.monotonic()
    while True:
        try:
            job = server.job(submission_id)
        except ConfigError:
            raise
        except RuntimeError:
            if time.monotonic() - answered > PATIENCE_S:
                raise
        else:
            answered = time.monotonic()
            if job.status.is_terminal():
                return exit_code(job)
            if deadline is not None and answered > deadline:
                raise RuntimeError(f"job {submission_id} is {job.status} after {limit_s:.0f} s: {job.message}")
        time.sleep(POLL_INTERVAL_S)


def follow(server: JobServer, submission_id: str, write: Callable[[str], object]) -> int:
    """Shows the log of a job, from its beginning to its end; a lost connection is taken up where it broke.

    Args:
        server: that has the job.
        submission_id: of the job.
        write: takes pieces of text.

    Returns:
        Its exit code.

    Raises:
        RuntimeError: the server stopped answering.
    """
    num_shown, answered = 0, time.monotonic()
    while True:
        before = num_shown
        try:
            num_shown += asyncio.run(_show(server, submission_id, num_shown, write))
            job = server.job(submission_id)
        except ConfigError:
            raise
        except _BrokenStreamError as error:
            num_shown += error.num_shown
            if num_shown == before and time.monotonic() - answered > PATIENCE_S:
                raise RuntimeError(str(error)) from error
        except RuntimeError:
            if time.monotonic() - answered > PATIENCE_S:
                raise
        else:
            answered = time.monotonic()
            if job.status.is_terminal():
                # The stream may have ended before the last lines were written.
                write(server.log(submission_id)[num_shown:])
                return exit_code(job)
        if num_shown > before:
            answered = time.monotonic()
        time.sleep(POLL_INTERVAL_S)


class _BrokenStreamError(RuntimeError):
    def __init__(self, message: str, num_shown: int) -> None:
        super().__init__(message)
        self.num_shown = num_shown


async def _show(server: JobServer, submission_id: str, num_known: int, write: Callable[[str], object]) -> int:
    """Writes what comes after the first `num_known` characters; returns how many more those are."""
    num_seen = 0
    try:
        async with aclosing(server.tail(submission_id)) as pieces:
            async for text in pieces:
                new = text[max(0, num_known - num_seen) :]
                num_seen += len(text)
                if new:
                    write(new)
    except ConfigError:
        raise
    except RuntimeError as error:
        raise _BrokenStreamError(str(error), max(0, num_seen - num_known)) from error
    return max(0, num_seen - num_known)
