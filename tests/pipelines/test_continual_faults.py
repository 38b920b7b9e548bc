"""The stage `continual` with its worker in this process: a cell that diverges, MLflow away, lessons that cells share,
and workers that may not write any more. With Ray it is run in `test_continual.py`.
"""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import ray.train.torch
import torch
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from pipelines import continual as stage
from pipelines import continual_worker
from pipelines.console import Console
from pipelines.continual_config import ContinualJobConfig
from pipelines.continual_report import MATRIX_NAME
from pipelines.continual_worker import FAILURE_NAME
from pipelines.experiments.catalog import load_continual_config
from pipelines.tracking import sync
from tests.support.fake_mlflow import URI, FakeMlflow, FakeRun, Fault
from userrep.training import replay
from userrep.training.cells import METHOD_FILE, CellResult
from userrep.training.continual import run_cell
from userrep.training.fence import StaleAttemptError, take_over
from userrep.training.run_record import RunRecord
from userrep.training.tracking import SPOOL_NAME, read_points

ORDER = ("T1", "T5", "T6")
# What TERACON adds to the loss of a second task is then infinite in float32, or infinity times 0.
DIVERGES = "{name: teracon, options: {retention_weight: 1.0e+300}}"


class LocalTrainer:
    """Stands in for Ray Train's trainer: one worker, in this process, which fails as a worker group does."""

    def __init__(
        self, train_loop: Callable[[dict[str, Any]], None], train_loop_config: dict[str, Any], **_: Any
    ) -> None:
        self._run, self._settings = train_loop, train_loop_config

    def fit(self) -> None:
        try:
            self._run(self._settings)
        except Exception as error:
            raise ray.train.WorkerGroupError("a worker failed", {0: error}) from error


class SpyConsole(Console):
    """Keeps what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setattr(replay, "connect", fake.connect)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", URI)
    return fake


@pytest.fixture(autouse=True)
def one_worker_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_local_world_size=lambda: 1))
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "TorchTrainer", LocalTrainer)
    monkeypatch.setattr(stage, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # would be those of all tests after this one


def load(*methods: str, orders: tuple[tuple[str, ...], ...] = (ORDER,)) -> ContinualJobConfig:
    overrides = [
        f"methods=[{', '.join(methods)}]",
        "tasks.source.num_users=150",
        "training.first.max_epochs=1",
        "training.later.max_epochs=1",
    ]
    return load_continual_config("smoke", None, overrides, "", [",".join(order) for order in orders], "")


def planned(config: ContinualJobConfig, workdir: Path) -> list[stage.Planned]:
    tasks = config.build_tasks()
    return stage.plan(config, tasks, stage.experiment_directory(config, tasks, workdir))


def points_of(directory: Path) -> set[tuple[str, float, int, int]]:
    """What is in a spool as MLflow keeps it: of each step the first point."""
    first: dict[int, dict[str, Any]] = {}
    for point, _ in read_points(directory / SPOOL_NAME):
        first.setdefault(point["step"], point)
    return {
        (name, value, step, point["time_ms"])
        for step, point in first.items()
        for name, value in point["metrics"].items()
    }


def run_of(mlflow: FakeMlflow, directory: Path) -> FakeRun:
    [run] = [run for run in mlflow.runs if run.tags[replay.RUN_TAG] == RunRecord.read(directory).key]
    return run


def assert_all_sent(mlflow: FakeMlflow, cells: list[stage.Planned]) -> None:
    parent = run_of(mlflow, cells[0].directory.parents[1])
    assert len(mlflow.runs) == 1 + len(cells)
    assert parent.status == "FINISHED"
    for cell in cells:
        run = run_of(mlflow, cell.directory)
        assert run.tags[MLFLOW_PARENT_RUN_ID] == parent.run_id
        assert run.status == ("FINISHED" if cell.is_complete else "FAILED")
        assert run.points == points_of(cell.directory)
        assert run.points


def test_a_cell_that_diverges_keeps_no_other_from_its_end(mlflow: FakeMlflow, tmp_path: Path) -> None:
    config = load("{name: fineall}", DIVERGES, "{name: sinmo}")
    fineall, teracon, sinmo = cells = planned(config, tmp_path)
    with pytest.raises(
        RuntimeError, match=r"1 cells have failed \(teracon\(retention_weight=1e\+300\) seed 0 T1>T5>T6"
    ):
        stage.run(config, tmp_path, Console())
    evidence = json.loads((teracon.directory / FAILURE_NAME).read_text())
    assert {"task": "T5", "phase": "train", "epoch": 1, "step": 0, "seed": 0}.items() <= evidence.items()
    assert "lower the learning rate" in evidence["message"]
    assert [path.name for path in sorted(teracon.directory.glob("task-*"))] == ["task-00"]
    report = stage.experiment_directory(config, config.build_tasks(), tmp_path) / stage.REPORT
    matrix = pq.read_table(report / MATRIX_NAME).to_pandas()
    assert set(matrix["method"]) == {"fineall", "sinmo"}
    assert fineall.is_complete
    assert sinmo.is_complete
    assert not any((cell.directory / FAILURE_NAME).exists() for cell in (fineall, sinmo))
    assert_all_sent(mlflow, cells)


def test_a_cell_that_has_failed_is_tried_again_and_the_others_are_not(mlflow: FakeMlflow, tmp_path: Path) -> None:
    config = load("{name: fineall}", DIVERGES)
    fineall, teracon = cells = planned(config, tmp_path)
    with pytest.raises(RuntimeError, match="1 cells have failed"):
        stage.run(config, tmp_path, Console())
    evidence = (teracon.directory / FAILURE_NAME).read_text()
    (teracon.directory / FAILURE_NAME).write_text("{}")
    lessons = [*fineall.directory.glob("task-*/*"), *teracon.directory.glob("task-*/*")]
    before = {path: path.stat().st_mtime_ns for path in lessons}
    with pytest.raises(RuntimeError, match="1 cells have failed"):
        stage.run(config, tmp_path, Console())
    assert (teracon.directory / FAILURE_NAME).read_text() == evidence
    assert {path: path.stat().st_mtime_ns for path in lessons} == before
    assert_all_sent(mlflow, cells)


@pytest.mark.parametrize(
    ("num_answers", "fault", "num_known"),
    [
        (0, "before", 0),
        (6, "before", 1),  # it has the run of the experiment
        (11, "after", 2),  # it has points of the first cell, and did not say so
    ],
)
def test_mlflow_away_at_the_end_costs_nothing(
    num_answers: int, fault: Fault, num_known: int, mlflow: FakeMlflow, tmp_path: Path
) -> None:
    config, console = load("{name: fineall}", "{name: sinmo}"), SpyConsole()
    cells = planned(config, tmp_path)
    mlflow.faults.extend("none" for _ in range(num_answers))
    mlflow.faults.append(fault)
    report = stage.run(config, tmp_path, console).report
    assert set(pq.read_table(report / MATRIX_NAME).to_pandas()["method"]) == {"fineall", "sinmo"}
    assert f"`userrep sync-tracking --workdir {tmp_path}` sends the rest" in console.said[-1]
    assert len(mlflow.runs) == num_known
    assert all(is_sent for is_sent, _ in sync(tmp_path, URI))
    assert_all_sent(mlflow, cells)


def test_orders_that_begin_alike_are_taught_it_once_and_both_runs_tell_it(mlflow: FakeMlflow, tmp_path: Path) -> None:
    config = load("{name: hat}", orders=(ORDER, ("T1", "T6", "T5"), ("T1", "T5", "noise", "T6")))
    original, reverse, noisy = cells = planned(config, tmp_path)
    stage.run(config, tmp_path, Console())
    for cell, num_shared in ((reverse, 1), (noisy, 2)):
        for number in range(num_shared):
            own, lent = (c.directory / f"task-{number:02d}" / METHOD_FILE for c in (cell, original))
            assert own.read_bytes() == lent.read_bytes()
        first, run = (run_of(mlflow, c.directory) for c in (original, cell))
        for name in ("val/T1/mrr_at_5", "val/T1/loss", "time/epoch_s", "test/T1/mrr_at_5"):
            own, lent = ([(step, value) for step, value, _ in r.history(name)] for r in (run, first))
            assert own[:num_shared] == lent[:num_shared], name
        # Each lesson has three points: before its one epoch, after it, and at its end. Only one that was taught has
        # steps to tell of.
        order = cell.cell.order
        assert [step for step, _, _ in run.history("test/T1/mrr_at_5")] == [3 * n + 3 for n in range(len(order))]
        assert [step for step, _, _ in run.history("train/loss")] == [3 * n + 2 for n in range(num_shared, len(order))]
    assert_all_sent(mlflow, cells)


def test_workers_whose_experiment_was_taken_over_change_nothing(
    mlflow: FakeMlflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job takes the experiment when they have begun, and lessons behind a damaged one await removal."""
    config = load("{name: fineall}")
    [cell] = planned(config, tmp_path)
    stage.run(config, tmp_path, Console())
    (cell.directory / "task-01" / METHOD_FILE).unlink()

    def run_late(*args: Any) -> CellResult:
        take_over(cell.directory.parents[1], "other")
        return run_cell(*args)

    monkeypatch.setattr(continual_worker, "run_cell", run_late)
    with (
        pytest.warns(UserWarning, match="lesson passed over"),
        pytest.raises(RuntimeError, match=r"worker 0 failed: .*job other has the run") as caught,
    ):
        stage.run(config, tmp_path, Console())
    group_error = caught.value.__cause__
    assert isinstance(group_error, ray.train.WorkerGroupError)
    assert isinstance(group_error.worker_failures[0], StaleAttemptError)
    assert [path.name for path in sorted(cell.directory.glob("task-*"))] == ["task-00", "task-01", "task-02"]
