"""The process that sends a run to MLflow while it trains: whatever MLflow does, training hears nothing of it.

A process, because it can be left alone in the middle of a request that is never answered: it ends by itself, when the
request has run into its limit. It also outlives a job that is killed, and then tells MLflow so. It takes 170 MiB with
a server and 230 MiB with a database, and 2 to 4 CPU seconds to start (mlflow 3.17.2).
"""

import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from userrep.publishing.connection import Limits
from userrep.training.replay import Replay, sole_sender

LOG_NAME = "tracking.log"
FLUSH_INTERVAL_S = 5.0
DRAIN_S = 5.0  # how long the end of training waits for MLflow
LIVE_LIMITS = Limits(timeout_s=5, retries=0)  # the next flush is the retry
JOB_DIED = "KILLED"


class Follower:
    """The job's handle of the process. Neither starting it nor ending it waits for MLflow.

    Args:
        run_dir: holds the record of the run; gets the process's log.
        tracking_uri: of the MLflow server or database, absolute.
    """

    def __init__(self, run_dir: Path, tracking_uri: str) -> None:
        self._log = run_dir / LOG_NAME
        # By the environment, because a URI may hold a password and everybody can read a command line.
        env = {**os.environ, "MLFLOW_TRACKING_URI": tracking_uri, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(run_dir)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=env,
                process_group=0,  # Ctrl-C is for the job, which then says how the run has ended
            )

    def finish(self, status: str) -> str | None:
        """Lets the process send the rest and end the run, for a few seconds at most.

        Args:
            status: FINISHED, FAILED or KILLED.

        Returns:
            Why MLflow does not have everything now; None when it has.
        """
        try:
            self._process.communicate(status.encode(), timeout=DRAIN_S)
        except subprocess.TimeoutExpired:
            # It goes on by itself, and may be done in a moment.
            return f"it was not done {DRAIN_S:g} s after the last step"
        if self._process.returncode == 0:
            return None
        lines = self._log.read_text(errors="replace").splitlines()
        return lines[-1] if lines else f"its process ended with code {self._process.returncode}"


def follow(replay: Replay, wait: Callable[[float], str | None]) -> str | None:
    """Sends what a job writes until the job has ended.

    Args:
        replay: of the job's run.
        wait: waits so many seconds for the end of the job; returns its status, or None when it goes on.

    Returns:
        Why MLflow does not have everything; None when it has.
    """
    status = None
    while status is None:
        _failure(replay.flush)
        status = wait(FLUSH_INTERVAL_S)
    return _failure(replay.flush) or _failure(lambda: replay.finish(status))


def main() -> int:
    """Runs in the process; the last line of its output is what `follow` returned."""
    run_dir = Path(sys.argv[1])
    with sole_sender(run_dir, waits=True):  # the process of a job that was killed may still have something to send
        replay = Replay(run_dir, os.environ["MLFLOW_TRACKING_URI"], LIVE_LIMITS, is_live=True)
        reason = follow(replay, _wait_for_status)
    if reason is not None:
        sys.stderr.write(reason + "\n")
    return int(reason is not None)


def _wait_for_status(seconds: float) -> str | None:
    readable, _, _ = select.select([sys.stdin], [], [], seconds)
    return (sys.stdin.readline().strip() or JOB_DIED) if readable else None


def _failure(action: Callable[[], object]) -> str | None:
    """Does it; returns the first line of what went wrong."""
    try:
        action()
    except Exception as error:  # whatever it was: the next attempt may succeed, and nobody here could handle it
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


if __name__ == "__main__":
    sys.exit(main())
