"""The spool of a run, sent to MLflow: by one process at a time, in batches, as often as one likes.

MLflow gets one point for each step, the first in the spool. A resumed attempt takes steps again and writes
them with other times; MLflow, which replaces no point, would show both. So what is sent is a function of the spool
alone, and MLflow drops a point whose key, value, step and time it has: sending everything twice is harmless. The cursor
file beside the spool says what MLflow has; it saves work and nothing depends on it.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from userrep.config import Config
from userrep.manifest import write_json
from userrep.publishing.connection import WRITE_LIMITS, Limits, connect
from userrep.publishing.runs import experiment_of
from userrep.training.run_record import RUNNING, RunRecord
from userrep.training.tracking import SPOOL_NAME, read_points

CURSOR_NAME = "tracking.cursor.json"
LOCK_NAME = "tracking.lock"
JOB_LOCK_NAME = "job.lock"

RUN_TAG = "userrep.run"  # its value is the record's key: a resumed job finds the run that it started
STAGE_TAG = "userrep.stage"
HEARTBEAT_TAG = "userrep.heartbeat"  # unix seconds at which the job was last known to live
HEARTBEAT_S = 30
BATCH_METRICS = 900  # MLflow accepts 1000 per request
MAX_PARAM_CHARS = 500


class RunBusyError(ValueError):
    """Another process is sending this run: its own job, or another `userrep sync-tracking`."""


class Cursor(Config):
    """What MLflow has: the id of the run, and the last step."""

    run_id: str = ""
    last_step: int = -1


@dataclass(frozen=True)
class Sent:
    """What `send_run` did: values that it sent, and the run's state in MLflow."""

    run_id: str
    num_values: int
    status: str


class Replay:
    """Sends one run, from the point where an earlier replay stopped.

    Args:
        run_dir: holds the record and the spool; its name is that of the run.
        tracking_uri: of the MLflow server or database.
        limits: bounds on each request.
        is_live: whether the job runs: the run in MLflow is then kept RUNNING, with a heartbeat.
    """

    def __init__(self, run_dir: Path, tracking_uri: str, limits: Limits, is_live: bool) -> None:
        self._run_dir, self._uri, self._limits, self._is_live = run_dir, tracking_uri, limits, is_live
        self._spool = run_dir / SPOOL_NAME
        self._cursor = Cursor()
        self._offset = 0
        self._beat_at = 0.0
        self._is_open = False

    @property
    def run_id(self) -> str:
        """Id of the run in MLflow; empty before the first `flush`."""
        return self._cursor.run_id

    def flush(self) -> int:
        """Opens the run where that is not done, and sends everything new. Returns the number of values sent.

        Raises:
            RegistryError: MLflow could not be reached, or refused something; the next call goes on there.
            OSError: the cursor could not be written; the next call sends its last batch again.
        """
        num_values = 0
        with connect(self._uri, limits=self._limits, create=True) as client:
            try:
                if not self._is_open:
                    self._open(client)
                self._beat(client)
                for metrics, offset in self._batches():
                    # A point that MLflow has must not be lost here: the step's next point would have another time.
                    _make_durable(self._spool)
                    client.log_batch(self.run_id, metrics=metrics)
                    self._cursor = Cursor(run_id=self.run_id, last_step=metrics[-1].step)
                    self._offset = offset
                    write_json(self._run_dir / CURSOR_NAME, self._cursor.model_dump(mode="json"))
                    num_values += len(metrics)
                    self._beat(client)
            except BaseException:
                self._is_open = False  # the next call looks again at what is there, maybe another database
                raise
        return num_values

    def finish(self, status: str) -> None:
        """Ends the run in MLflow, at the time of its last point.

        Args:
            status: FINISHED, FAILED or KILLED.

        Raises:
            RegistryError: MLflow could not be reached.
        """
        last = None
        for point, _ in read_points(self._spool):
            last = point["time_ms"]
        with connect(self._uri, limits=self._limits, create=True) as client:
            client.set_terminated(self.run_id, status, end_time=last)

    def _open(self, client: MlflowClient) -> None:
        """Finds or makes the run, and gives it its parameters; takes the cursor if it is one of this run."""
        record = RunRecord.read(self._run_dir)
        experiment_id = experiment_of(client, record.experiment, None, self._uri, None)
        run_id = _search_run(client, experiment_id, record.key)
        if run_id is None:
            first = next(read_points(self._spool), None)
            tags = {RUN_TAG: record.key, STAGE_TAG: record.stage, HEARTBEAT_TAG: str(int(time.time()))}
            started_ms = first[0]["time_ms"] if first else None
            if record.parent and (parent_id := _search_run(client, experiment_id, record.parent)) is not None:
                tags[MLFLOW_PARENT_RUN_ID] = parent_id
            name = record.name or self._run_dir.name
            run_id = client.create_run(experiment_id, started_ms, tags, run_name=name).info.run_id
        params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flatten(record.config)]
        client.log_batch(run_id, params=params)
        cursor = _read_cursor(self._run_dir / CURSOR_NAME)
        self._cursor = cursor if cursor.run_id == run_id else Cursor(run_id=run_id)
        self._offset, self._beat_at = 0, 0.0
        self._is_open = True

    def _beat(self, client: MlflowClient) -> None:
        if not self._is_live or time.monotonic() < self._beat_at:
            return
        client.set_tag(self.run_id, HEARTBEAT_TAG, str(int(time.time())))
        # Also after the first time: somebody may have taken the job for dead while MLflow was away.
        client.update_run(self.run_id, status=RUNNING)
        self._beat_at = time.monotonic() + HEARTBEAT_S

    def _batches(self) -> Iterator[tuple[list[Metric], int]]:
        """What MLflow does not have yet, and the offset behind the last line of each batch.

        The steps of an attempt rise and the next attempt begins at one of them, so a step was sent exactly if it is not
        above the last one.
        """
        metrics: list[Metric] = []
        last_step, offset = self._cursor.last_step, self._offset
        for point, end in read_points(self._spool, self._offset):
            step, time_ms = point["step"], point["time_ms"]
            new = [Metric(key, value, time_ms, step) for key, value in point["metrics"].items() if step > last_step]
            if metrics and len(metrics) + len(new) > BATCH_METRICS:
                yield metrics, offset
                metrics = []
            metrics += new
            last_step = max(last_step, step)
            offset = end
        if metrics:
            yield metrics, offset


def send_run(run_dir: Path, tracking_uri: str, waits: bool) -> Sent:
    """Sends everything that MLflow lacks of a run that is over, its end included.

    Args:
        run_dir: of the run.
        tracking_uri: of the MLflow server or database.
        waits: whether it waits for another process that is sending the run.

    Raises:
        RunBusyError: its job still runs, or somebody else is doing this, and `waits` is False.
        RegistryError: MLflow could not be reached or refused; calling again goes on there.
    """
    with sole_sender(run_dir, waits), _locked(run_dir / JOB_LOCK_NAME, fcntl.LOCK_EX, waits):
        replay = Replay(run_dir, tracking_uri, WRITE_LIMITS, is_live=False)
        num_values = replay.flush()
        recorded = RunRecord.read(run_dir).status
        status = "KILLED" if recorded == RUNNING else recorded  # a living job would have its lock
        replay.finish(status)
        return Sent(replay.run_id, num_values, status)


def sole_sender(run_dir: Path, waits: bool) -> AbstractContextManager[None]:
    """Holds the right to send a run.

    Raises:
        RunBusyError: somebody has it, and `waits` is False.
    """
    return _locked(run_dir / LOCK_NAME, fcntl.LOCK_EX, waits)


def living_job(run_dir: Path) -> AbstractContextManager[None]:
    """Says while it is held that a job of the run lives; the kernel lets it go when the job dies."""
    return _locked(run_dir / JOB_LOCK_NAME, fcntl.LOCK_SH, waits=True)


@contextmanager
def _locked(path: Path, mode: int, waits: bool) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, mode | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError as error:
            name = path.parent.name
            raise RunBusyError(f"run {name} goes on, or is being sent by another process; not touched") from error
        yield


def find_run(client: MlflowClient, experiment: str, key: str) -> str | None:
    """Id in MLflow of the run with this record key, None if it was not sent yet; inside a `connect` block."""
    found = client.get_experiment_by_name(experiment)
    return _search_run(client, found.experiment_id, key) if found else None


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested config as dotted (key, value) pairs."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _search_run(client: MlflowClient, experiment_id: str, key: str) -> str | None:
    """The oldest run of this key: a server that answers too late may have made two."""
    wanted, order = f"tags.`{RUN_TAG}` = '{key}'", ["attributes.start_time ASC"]
    runs = client.search_runs([experiment_id], wanted, max_results=1, order_by=order)
    return runs[0].info.run_id if runs else None


def _read_cursor(path: Path) -> Cursor:
    try:
        return Cursor.parse(json.loads(path.read_text()))
    except (OSError, ValueError):
        return Cursor()


def _make_durable(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
