"""The attempt fence: of all attempts at a run, only the newest may write to its directory.

A scheduler may start a run again while an earlier start is still alive somewhere: a node that was given up for lost, a
process that was stopped and goes on. Its directory says which attempt is the newest one, and a writer looks there
before every write. An attempt is one start of a worker group; a job is one call of `train`, which may need several.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from userrep import storage
from userrep.manifest import write_json
from userrep.mirror import object_name, shown
from userrep.training.ledger import append_line, read_ledger
from userrep.training.log_pieces import receive_log, send_piece

T = TypeVar("T")

ATTEMPT_NAME = "attempt.json"
FAILURES_NAME = "failures.jsonl"  # errors of workers, for people, and for the message when a run is given up
STORAGE_PATIENCE_S = 15.0  # below `workers.timeout_s`, after which other workers give this one up
RETRY_INTERVAL_S = 0.5
LINE_AGE_S = 5.0  # how old what an attempt knows may be when it writes what no other process reads (object storage)


class StaleAttemptError(RuntimeError):
    """A newer attempt at this run has started; this one must not write any more."""


@dataclass(frozen=True)
class Attempt:
    """The right of a worker group to write to a run directory, until a newer attempt takes it.

    Attributes:
        run_dir: what is written to.
        number: 1 for the first attempt at the run, then 2, ...; 0 before there is one.
        job: identifies the call of `train` that started it.
        checkpoint: name of the checkpoint that all its workers start from; None: they start anew.
    """

    run_dir: Path
    number: int
    job: str
    checkpoint: str | None

    def check(self, max_age_s: float = 0.0) -> None:
        """Call it right before every write.

        Args:
            max_age_s: in object storage, what was seen no longer ago is new enough.

        Raises:
            StaleAttemptError: a newer attempt or another job has taken the run.
        """
        newest = _read(self.run_dir, max_age_s)
        if newest != self:
            raise StaleAttemptError(
                f"attempt {self.number} at the run in {shown(self.run_dir)} stops: "
                f"attempt {newest.number if newest else 'unknown'} of job {newest.job if newest else 'unknown'} has "
                "the run now. Nothing is lost; end one of the two jobs if you started both"
            )

    def begin(self) -> None:
        """Says that a worker of this attempt was started."""
        self.check()
        self._mark.touch()
        storage.send(self.run_dir, self._mark.name)

    def end(self) -> bool:
        """Takes note of the end of this attempt. Returns whether a worker of it was started."""
        storage.refresh(self._mark)
        had_begun = self._mark.exists()
        storage.remove(self._mark)
        return had_begun

    def note_failure(self, rank: int, error: Exception) -> None:
        """Keeps why a worker failed, as far as storage and fence allow."""
        try:
            self.check()
            what = f"{type(error).__name__}: {error}"
            line = {"attempt": self.number, "rank": rank, "time_ms": _now_ms(), "error": what}
            with (self.run_dir / FAILURES_NAME).open("ab+", buffering=0) as stream:
                append_line(stream, line)
            send_piece(self.run_dir / FAILURES_NAME, self.number, rank, f"{json.dumps(line)}\n".encode())
        except (OSError, StaleAttemptError):
            return

    @property
    def _mark(self) -> Path:
        return self.run_dir / f".attempt-{self.number}"


def last_failure(run_dir: Path) -> str:
    """The last error of a worker, in words."""
    if object_name(run_dir) is not None:
        (run_dir / FAILURES_NAME).unlink(missing_ok=True)  # this node's own; those of all nodes are received
        receive_log(run_dir / FAILURES_NAME)
    lines = read_ledger(run_dir / FAILURES_NAME)
    return "worker {rank} of attempt {attempt}: {error}".format(**lines[-1]) if lines else "a worker was killed"


def take_over(run_dir: Path, job: str) -> None:
    """Gives the run to a job: attempts of other jobs may not write any more from here on."""
    newest = _read(run_dir)
    _write(Attempt(run_dir, newest.number if newest else 0, job, None))


def start_attempt(run_dir: Path, job: str, choose_checkpoint: Callable[[], str | None]) -> Attempt:
    """Starts the next attempt of the job that has the run.

    Args:
        run_dir: directory of the run.
        job: must have taken the run over.
        choose_checkpoint: called when earlier attempts may not write any more.

    Raises:
        StaleAttemptError: another job has the run.
    """
    before = current_attempt(run_dir, job)
    started = Attempt(run_dir, before.number + 1, job, None)
    _write(started)
    attempt = Attempt(run_dir, started.number, job, choose_checkpoint())
    _write(attempt)
    return attempt


def current_attempt(run_dir: Path, job: str) -> Attempt:
    """The newest attempt.

    Raises:
        StaleAttemptError: it belongs to another job.
    """
    newest = _read(run_dir)
    if newest is None or newest.job != job:
        raise StaleAttemptError(f"the run in {shown(run_dir)} belongs to another job by now; this one stops")
    return newest


def patiently(action: Callable[[], T]) -> T:
    """Repeats an action on storage that fails, for `STORAGE_PATIENCE_S`: a short outage costs time, not the run.

    Args:
        action: may be called again after an OSError.

    Raises:
        OSError: of the last try.
    """
    deadline = time.monotonic() + STORAGE_PATIENCE_S
    while True:
        try:
            return action()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(RETRY_INTERVAL_S)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _read(run_dir: Path, max_age_s: float = 0.0) -> Attempt | None:
    storage.refresh(run_dir / ATTEMPT_NAME, max_age_s)
    try:
        values = json.loads((run_dir / ATTEMPT_NAME).read_text())
        return Attempt(run_dir, values["attempt"], values["job"], values["checkpoint"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise RuntimeError(
            f"{run_dir / ATTEMPT_NAME} is damaged ({error}); delete it when no job works on this run"
        ) from error


def _write(attempt: Attempt) -> None:
    attempt.run_dir.mkdir(parents=True, exist_ok=True)
    values = {"attempt": attempt.number, "job": attempt.job, "checkpoint": attempt.checkpoint}
    write_json(attempt.run_dir / ATTEMPT_NAME, values)
    storage.send(attempt.run_dir, ATTEMPT_NAME)
