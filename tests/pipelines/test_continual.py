"""The stage `continual`: its configs, and all methods on a small synthetic world, from the command line to MLflow."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from pipelines import continual as stage
from pipelines.console import Console
from pipelines.continual_config import ContinualJobConfig, reverse
from pipelines.continual_report import FIGURES, MATRIX_NAME, TABLE_NAME
from pipelines.experiments.catalog import CONTINUAL_CONFIGS, load_continual_config
from pipelines.mlflow_store import local_tracking_uri
from tests.support.fake_mlflow import URI, FakeMlflow
from userrep.config import ConfigError
from userrep.continual.catalog import METHODS
from userrep.evaluation.transfer import backward_transfer
from userrep.training import replay
from userrep.training.cells import METHOD_FILE
from userrep.training.run_record import RunRecord

ORDER = ("T1", "T2", "T3", "T4", "T5", "T6")
ISOLATING = ("piggyback", "peterrec", "conure", "sinmo")


def load(name: str = "smoke", overrides: tuple[str, ...] = (), methods: str = "", orders: tuple[str, ...] = ()):
    return load_continual_config(name, None, list(overrides), methods, list(orders), "")


@pytest.mark.parametrize("name", CONTINUAL_CONFIGS)
def test_every_config_builds_and_comes_back(name: str) -> None:
    config = CONTINUAL_CONFIGS[name]()
    assert config.name == name
    assert ContinualJobConfig.parse(config.model_dump(mode="json")) == config
    assert {method.name for method in config.methods} == ({"teracon"} if name == "ml1m_sampling" else set(METHODS))


def test_cells_are_methods_within_seeds_within_orders() -> None:
    config = load_continual_config("smoke", None, [], "hat, teracon", ["T1,T2", "T1,noise,T2"], "4,5")
    tasks = config.build_tasks()
    assert [task.name for task in tasks.tasks] == [*ORDER, "noise"]
    cells = [(cell.order, cell.seed, cell.method) for cell in config.cells(tasks)]
    assert cells == [
        (order, seed, method)
        for order in (("T1", "T2"), ("T1", "noise", "T2"))
        for seed in (4, 5)
        for method in ("hat", "teracon")
    ]


def test_the_default_order_is_that_of_the_data() -> None:
    config = load()
    assert {cell.order for cell in config.cells(config.build_tasks())} == {ORDER}
    assert reverse(ORDER) == ("T1", "T6", "T5", "T4", "T3", "T2")


@pytest.mark.parametrize(
    ("overrides", "methods", "orders", "message"),
    [
        ((), "ewc", (), "unknown method 'ewc': use one of sinmo"),
        (("methods=[{name: hat, options: {sparsity: 1}}]",), "", (), "sparsity"),
        ((), "", ("T1,T9",), "order names T9: the tasks are T1"),
        ((), "", ("T1,T2,T1",), "has a task twice"),
        (("seeds=[]",), "", (), "seeds"),
        (("seeds=[1, 2, 1]",), "", (), "an entry twice"),
        ((), "hat,hat", (), "an entry twice"),
    ],
)
def test_what_does_not_fit_is_an_error(
    overrides: tuple[str, ...], methods: str, orders: tuple[str, ...], message: str
) -> None:
    def cells() -> None:
        config = load("smoke", overrides, methods, orders)
        config.cells(config.build_tasks())

    with pytest.raises(ConfigError, match=message):
        cells()


def test_an_unknown_config_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match="smoke, synthetic, ml1m"):
        load("demo")


def test_every_new_outcome_is_a_step_of_the_experiments_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeMlflow()
    monkeypatch.setattr(replay, "connect", fake.connect)
    RunRecord.start(tmp_path, "tasks", {"training": {}}, stage=stage.STAGE, status="FINISHED")
    outcomes = [{}, {"final/T1/hat": 0.1}, {"final/T1/hat": 0.1}, {"final/T1/hat": 0.3, "final/T1/teracon": 0.2}]
    num_sent = []
    for outcome in (*outcomes, outcomes[-1]):
        stage.spool_outcome(tmp_path, outcome)
        num_sent.append(replay.send_run(tmp_path, URI, waits=True).num_values)
    assert num_sent == [0, 1, 0, 2, 0]
    (run,) = fake.runs
    assert [(step, value) for step, value, _ in run.history("final/T1/hat")] == [(1, 0.1), (2, 0.3)]
    assert [(step, value) for step, value, _ in run.history("final/T1/teracon")] == [(2, 0.2)]
    assert run.status == "FINISHED"


@pytest.fixture(scope="module")
def finished(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[ContinualJobConfig, Path, Path]:
    """All methods, taught six tasks."""
    config, workdir = load(), tmp_path_factory.mktemp("continual") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        report = stage.run(config, workdir, Console()).report
    return config, workdir, report


pytest_ray = [
    pytest.mark.ray,
    # SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:.*noload.*"),
]


def ray_test(function):
    for mark in pytest_ray:
        function = mark(function)
    return function


@ray_test
def test_the_report_holds_every_method_and_task(finished: tuple[ContinualJobConfig, Path, Path]) -> None:
    _, _, report = finished
    matrix = pq.read_table(report / MATRIX_NAME).to_pandas()
    assert set(matrix["method"]) == set(METHODS)
    assert matrix["score"].between(0, 1).all()
    for name, rows in matrix.groupby("method"):
        assert len(rows) == (6 if name == "mtl" else 21), name
    table = (report / TABLE_NAME).read_text()
    assert all(f"| {name} |" in table for name in (*METHODS, "popularity"))
    names = {path.stem for path in (report / FIGURES).glob("*.svg")}
    masks = {f"masks-order1-{name}" for name in ("teracon", "hat")}
    assert names == {f"scores-order1-{name}" for name in METHODS} | masks | {"forgetting-order1", "adaptation-order1"}


@ray_test
def test_isolating_methods_forget_nothing(finished: tuple[ContinualJobConfig, Path, Path]) -> None:
    config, workdir, _ = finished
    tasks = config.build_tasks()
    for planned in stage.plan(config, tasks, stage.experiment_directory(config, tasks, workdir)):
        result = planned.result()
        assert result is not None
        if planned.cell.method in ISOLATING:
            assert np.nanmax(np.abs(backward_transfer(result.scores_MM))) == 0, planned.cell.method
        elif planned.cell.method == "fineall":
            assert not np.array_equal(result.scores_MM[-1], np.diagonal(result.scores_MM))


@ray_test
def test_every_cell_is_a_run_below_that_of_the_experiment(finished: tuple[ContinualJobConfig, Path, Path]) -> None:
    config, workdir, report = finished
    client = MlflowClient(local_tracking_uri(workdir))
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(runs) - 1 == len(METHODS)
    assert {run.info.status for run in runs} == {"FINISHED"}
    rows = pq.read_table(report / MATRIX_NAME).to_pylist()
    final = {f"final/{row['task']}/{row['method']}": row["score"] for row in rows if row["j"] == len(ORDER) - 1}
    assert {name: value for name, value in parent.data.metrics.items() if name.startswith("final/")} == final
    assert {f"backward_transfer/T1/{name}" for name in METHODS if name != "mtl"} <= parent.data.metrics.keys()
    for run in children:
        history = client.get_metric_history(run.info.run_id, "test/T1/mrr_at_5")
        assert len(history) == (1 if run.data.params["method"] == "mtl" else 6)


@ray_test
def test_what_is_finished_is_not_run_again_and_what_is_not_goes_on(
    finished: tuple[ContinualJobConfig, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One method is interrupted, and another seed of it comes later, as the only one that the command names."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, workdir, report = finished
    for name in (stage.CONTINUAL, "mlflow.db"):
        copy = shutil.copytree if (workdir / name).is_dir() else shutil.copyfile
        copy(workdir / name, tmp_path / name)
    later = load_continual_config("smoke", None, [], "teracon", [], "0,1")
    tasks = config.build_tasks()
    directory = stage.experiment_directory(later, tasks, tmp_path)
    assert directory.name == report.parent.name
    old, new = stage.plan(later, tasks, directory)
    for lesson in ("task-04", "task-05"):
        shutil.rmtree(old.directory / lesson)
    untouched = [p for p in directory.glob(f"cells/*/task-*/{METHOD_FILE}") if p.parents[1] != old.directory]
    before = {path: path.stat().st_mtime_ns for path in untouched}
    again = stage.run(later, tmp_path, Console()).report
    assert {path: path.stat().st_mtime_ns for path in untouched} == before
    assert new.is_complete
    table, first = ((place / TABLE_NAME).read_text() for place in (again, report))
    assert "| teracon | 2 |" in table
    of_others, before_of_others = (
        [line for line in page.splitlines() if "teracon" not in line and "popularity |" not in line]
        for page in (table, first)
    )
    assert of_others == before_of_others
    client = MlflowClient(local_tracking_uri(tmp_path))
    experiment = client.get_experiment_by_name(config.experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(METHODS) + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [p.step for p in client.get_metric_history(parent.info.run_id, "final/T1/teracon")] == [1, 2]
