"""Metrics of a run: an fsynced local spool that training writes, replayed to MLflow by somebody else.

Training never waits for MLflow and never fails with it: the spool is the truth, and replaying it twice is harmless,
because MLflow drops points whose (key, value, step, timestamp) it already has.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

BATCH_METRICS = 900  # MLflow accepts 1000 per call
MAX_PARAM_CHARS = 500


class MetricSpool:
    """Append-only JSON lines of metrics, written by rank 0."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a", encoding="utf-8")

    def write(self, step: int, time_ms: int, metrics: dict[str, float], is_durable: bool = False) -> None:
        """Appends one point per metric; with `is_durable`, returns only when the disk has it."""
        self._stream.write(json.dumps({"step": step, "time_ms": time_ms, "metrics": metrics}) + "\n")
        self._stream.flush()
        if is_durable:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class SpoolReader:
    """Yields the complete lines that were appended since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """New points, oldest first; a half-written last line is left for the next call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            content = stream.read()
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [json.loads(line) for line in complete.splitlines()]


class MlflowReplay:
    """Sends a spool to one MLflow run, in batches, from the point where an earlier replay stopped."""

    def __init__(self, client: MlflowClient, run_id: str, spool: Path) -> None:
        self._client, self._run_id, self._reader = client, run_id, SpoolReader(spool)
        self._pending: list[Metric] = []

    def flush(self) -> None:
        """Sends everything new; what MLflow does not take now stays pending for the next call.

        Raises:
            MlflowException: MLflow cannot be reached, or refuses a metric.
        """
        for point in self._reader.read():
            self._pending += [
                Metric(key, value, point["time_ms"], point["step"]) for key, value in point["metrics"].items()
            ]
        for batch in _batches(self._pending):
            self._client.log_batch(self._run_id, metrics=batch)
            self._pending = self._pending[len(batch) :]

    def try_flush(self) -> str | None:
        """Like `flush`, but returns the reason instead of raising when MLflow cannot be reached."""
        try:
            self.flush()
        except (MlflowException, OSError) as error:
            return str(error).splitlines()[0]
        return None


def open_run(
    client: MlflowClient, experiment: str, name: str, config: dict[str, Any], artifact_root: Path | None
) -> str:
    """Finds or creates the experiment and this config's run. Returns the run id.

    A run is known by the tag `userrep.run`, so a resumed job goes on with the run that it started.

    Args:
        client: of the tracking server or database.
        experiment: name of the experiment.
        name: of the run, the hash of what it depends on.
        config: resolved config, logged as parameters.
        artifact_root: where a new experiment keeps its artifacts; None leaves it to the server.
    """
    location = artifact_root.as_uri() if artifact_root else None
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment, location)
    runs = client.search_runs([experiment_id], filter_string=f"tags.`userrep.run` = '{name}'", max_results=1)
    if runs:
        run_id = runs[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return run_id
    run = client.create_run(experiment_id, run_name=name, tags={"userrep.run": name})
    params = [Param(key, str(value)[:MAX_PARAM_CHARS]) for key, value in flatten(config)]
    client.log_batch(run.info.run_id, params=params, tags=[RunTag("userrep.stage", "pretrain")])
    return run.info.run_id


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested config as dotted (key, value) pairs."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _batches(metrics: list[Metric]) -> list[list[Metric]]:
    return [metrics[start : start + BATCH_METRICS] for start in range(0, len(metrics), BATCH_METRICS)]
