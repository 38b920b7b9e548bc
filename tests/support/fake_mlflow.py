"""MLflow in memory, as far as a replay uses it: every request may fail, before it was carried out or after."""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, Literal

from mlflow.entities import Metric, Param

from userrep.publishing.connection import RegistryError

URI = "http://mlflow.example"
Fault = Literal["none", "before", "after"]


class FakeRun:
    def __init__(self, run_id: str, experiment: str, tags: dict[str, str], start_ms: int | None) -> None:
        self.run_id, self.experiment, self.tags, self.start_ms = run_id, experiment, dict(tags), start_ms
        self.status, self.end_ms = "RUNNING", None
        self.params: dict[str, str] = {}
        self.points: set[tuple[str, float | str, int, int]] = set()  # key, value, step, time: MLflow's primary key

    @property
    def info(self) -> SimpleNamespace:
        return SimpleNamespace(run_id=self.run_id)

    def history(self, key: str) -> list[tuple[int, float | str, int]]:
        """Points of a metric: step, value, time; by step."""
        return sorted((step, value, time_ms) for name, value, step, time_ms in self.points if name == key)


class FakeMlflow:
    """Its client and its server; `faults` say what becomes of the next requests, then all succeed unless it is down."""

    def __init__(self) -> None:
        self.experiments: list[str] = []
        self.runs: list[FakeRun] = []
        self.faults: deque[Fault] = deque()
        self.is_down = False
        self.batch_sizes: list[int] = []
        self.beats = 0

    @contextmanager
    def connect(self, tracking_uri: str, *, limits: Any = None, create: bool = False) -> Iterator["FakeMlflow"]:
        """Stands in for `userrep.publishing.connection.connect`."""
        yield self

    @contextmanager
    def _request(self) -> Iterator[None]:
        fault = "before" if self.is_down else self.faults.popleft() if self.faults else "none"
        if fault == "before":
            raise RegistryError("no answer")
        yield
        if fault == "after":
            raise RegistryError("the answer was lost")

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        with self._request():
            return SimpleNamespace(experiment_id=name, lifecycle_stage="active") if name in self.experiments else None

    def create_experiment(self, name: str, artifact_location: str | None) -> str:
        with self._request():
            if name in self.experiments:
                raise RegistryError(f"experiment {name} exists")
            self.experiments.append(name)
        return name

    def search_runs(
        self, experiment_ids: list[str], filter_string: str, max_results: int, order_by: list[str]
    ) -> list[FakeRun]:
        assert order_by == ["attributes.start_time ASC"]
        with self._request():
            key, value = filter_string.removeprefix("tags.`").removesuffix("'").split("` = '")
            found = [run for run in self.runs if run.experiment in experiment_ids and run.tags.get(key) == value]
        return found[:max_results]

    def create_run(self, experiment_id: str, start_time: int | None, tags: dict[str, str], run_name: str) -> FakeRun:
        with self._request():
            self.runs.append(FakeRun(f"id{len(self.runs)}", experiment_id, tags, start_time))
        return self.runs[-1]

    def log_batch(self, run_id: str, metrics: list[Metric] = (), params: list[Param] = ()) -> None:
        if not metrics and not params:
            return
        with self._request():
            run = self._run(run_id)
            for param in params:
                assert run.params.setdefault(param.key, param.value) == param.value, (
                    "MLflow refuses a changed parameter"
                )
            points = [(m.key, "nan" if math.isnan(m.value) else m.value, m.step, m.timestamp) for m in metrics]
            run.points.update(points)
        self.batch_sizes.append(len(metrics))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        with self._request():
            self._run(run_id).tags[key] = value
        self.beats += 1

    def update_run(self, run_id: str, status: str) -> None:
        with self._request():
            self._run(run_id).status = status

    def set_terminated(self, run_id: str, status: str, end_time: int | None) -> None:
        with self._request():
            run = self._run(run_id)
            run.status, run.end_ms = status, end_time

    def _run(self, run_id: str) -> FakeRun:
        return next(run for run in self.runs if run.run_id == run_id)
