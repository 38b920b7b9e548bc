"""A sweep of six tiny cells: plan, lanes, table of runs, report, MLflow, and going on after damage."""

import json
import math
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from pipelines import sweep
from pipelines.console import Console
from pipelines.experiments.catalog import SWEEP_CONFIGS, load_sweep_config
from pipelines.sweep_cell import read_row
from pipelines.sweep_cli import app
from pipelines.sweep_config import LanesConfig
from pipelines.sweep_finish import finish
from pipelines.sweep_jobs import run_one
from pipelines.sweep_lanes import USABLE_MEMORY, find_room, run_lanes
from pipelines.sweep_plan import Budget, Room, SweepPlan, Throughput
from pipelines.sweep_queue import FAILURE_NAME, JOURNAL_NAME
from userrep.config import ConfigError
from userrep.schema import RUNS

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*noload.*"),  # MLflow's own use of SQLAlchemy
    # A sweep without a cell to run may be over before the process that follows it has started; that goes on by itself.
    pytest.mark.filterwarnings("ignore:.*Popen.__del__.*"),
]

THROUGHPUT = Throughput(parameters=(1.0,), flops_per_s=(1e10,), origin="given")


@dataclass
class Swept:
    plan: SweepPlan
    outcome: sweep.Outcome
    workdir: Path
    text: str


def run(plan: SweepPlan, workdir: Path, max_hours: float | None = None) -> sweep.Outcome:
    console = Console()
    return sweep.run(plan, workdir, console, partial(run_lanes, plan, THROUGHPUT, max_hours, console))


@pytest.fixture(scope="module")
def swept(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The sweep, run to its end."""
    workdir = tmp_path_factory.mktemp("sweep")
    plan = sweep.prepare(SWEEP_CONFIGS["sweep_smoke"](), workdir, Console())
    outcome = run(plan, workdir)
    return Swept(plan, outcome, workdir, finish(plan, outcome, workdir, None, Console()))


def starts(workdir: Path) -> list[str]:
    lines = map(json.loads, (workdir / "sweep" / JOURNAL_NAME).read_text().splitlines())
    return [line["trunk_id"] for line in lines if line["event"] == "start"]


@pytest.mark.ray
def test_every_cell_is_measured_by_the_same_evaluation(swept: Swept):
    rows = pq.read_table(swept.workdir / "sweep" / "runs" / "runs.parquet").to_pylist()
    assert swept.outcome.runs.schema.equals(RUNS, check_metadata=False)
    assert [row["cell_id"] for row in rows] == [planned.cell.cell_id for planned in swept.plan.cells]
    for row, planned in zip(rows, swept.plan.cells, strict=True):
        assert row["status"] == "finished"
        assert (row["pool_size"], row["flops"]) == (100, planned.flops)
        assert 0 < row["loss"] <= row["loss_as_trained"] <= math.log(100) + 0.5
        assert row["loss"] <= math.log(100) + 1e-6, "the best temperature is no worse than guessing"
        assert set(row["downstream_losses"] or {}), row
        assert row["flops_per_s"] == pytest.approx(planned.flops / row["train_s"])
        steps = [point["step"] for point in row["curve"]]
        assert steps == sorted(set(steps))
        assert steps[-1] == round(0.8 * planned.cell.num_steps), "measured where the rate begins to decay"
    assert not swept.outcome.failures
    assert not swept.outcome.passed_over


@pytest.mark.ray
def test_a_finished_sweep_starts_nothing(swept: Swept):
    before = starts(swept.workdir)
    again = run(swept.plan, swept.workdir)
    assert again.runs.equals(swept.outcome.runs)
    assert starts(swept.workdir) == before
    assert sorted(before) == sorted(unit.trunk_id for unit in swept.plan.units)


@pytest.mark.ray
def test_the_report_says_what_six_cells_cannot_say(swept: Swept):
    assert "6 cells finished" in swept.text
    page = (swept.workdir / "report" / "report.html").read_text()
    assert "not stated" in page or "cannot be said" in page
    assert (swept.workdir / "report" / "fit.json").is_file()


@pytest.mark.ray
def test_mlflow_has_a_run_for_each_cell_below_that_of_the_sweep(swept: Swept):
    client = MlflowClient(f"sqlite:///{swept.workdir / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("userrep-sweeps")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [one for one in runs if "mlflow.parentRunId" not in one.data.tags]
    assert len(parents) == 1
    assert parents[0].data.metrics["cells/finished"] == 6
    assert {one.path for one in client.list_artifacts(parents[0].info.run_id, "report")} >= {"report/report.html"}
    children = [one for one in runs if one.data.tags.get("mlflow.parentRunId") == parents[0].info.run_id]
    assert len(children) == 6
    measured = sorted(swept.outcome.runs["loss"].to_pylist())
    assert sorted(one.data.metrics["test/loss"] for one in children) == pytest.approx(measured)
    assert {one.info.status for one in runs} == {"FINISHED"}


@pytest.mark.ray
def test_a_cell_alone_is_what_it_was_in_its_lane(swept: Swept, tmp_path: Path):
    # A copy of the sweep without one cell of a trunk of three, and with a damaged result of another one.
    workdir = tmp_path / "copy"
    shutil.copytree(swept.workdir, workdir)
    trunk = max(swept.plan.units, key=lambda unit: len(unit.cells))
    middle = trunk.cells[1].cell.cell_id
    shutil.rmtree(workdir / "sweep" / "cells" / middle)
    run_one(workdir, middle)
    damaged = swept.plan.cells[-1].cell.cell_id
    path = workdir / "sweep" / "cells" / damaged / "result" / "run.json"
    path.write_text(path.read_text()[:-20])
    for cell_id in (middle, damaged):
        run_one(workdir, cell_id)
        now, before = (read_row(where / "sweep" / "cells" / cell_id) for where in (workdir, swept.workdir))
        assert now is not None
        assert before is not None
        for name in ("loss", "recall_at_10", "best_scale", "train_loss", "downstream_losses"):
            assert now[name] == before[name], name


@pytest.mark.ray
def test_cells_without_time_are_passed_over(swept: Swept, tmp_path: Path):
    workdir = tmp_path / "copy"
    shutil.copytree(swept.workdir, workdir)
    shutil.rmtree(workdir / "sweep" / "cells")
    plan = sweep.replan(workdir)
    outcome = run(plan, workdir, max_hours=1 / 3600)
    assert sorted(outcome.passed_over) == sorted(planned.cell.cell_id for planned in plan.cells)
    assert set(outcome.runs["status"].to_pylist()) == {"planned"}


@pytest.mark.ray
def test_status_and_plan_show_every_cell(swept: Swept):
    result = CliRunner().invoke(app, ["status", "--workdir", str(swept.workdir)])
    assert result.exit_code == 0, result.output
    assert "6 finished" in result.output
    for planned in swept.plan.cells:
        assert planned.cell.cell_id in result.output
    arguments = ["plan", "--config", "sweep_smoke", "--workdir", str(swept.workdir), "--flops-per-s", "1e9"]
    result = CliRunner().invoke(app, [*arguments, "--price-per-hour", "36", "--explain"])
    assert result.exit_code == 0, result.output
    assert "cost: " in result.output
    assert "width D" in result.output


@pytest.mark.ray
def test_what_has_failed_for_good_is_not_tried_again(swept: Swept, tmp_path: Path):
    workdir = tmp_path / "copy"
    shutil.copytree(swept.workdir, workdir)
    plan = sweep.replan(workdir)
    final, lost = (planned.cell.cell_id for planned in plan.cells[:2])
    for cell_id, is_final in ((final, True), (lost, False)):
        directory = plan.cell_directory(cell_id)
        shutil.rmtree(directory / "result")
        (directory / FAILURE_NAME).write_text(json.dumps({"message": "diverged: so it is", "is_final": is_final}))
    left = [planned.cell.cell_id for unit in sweep.units_left(plan) for planned in unit.cells]
    assert left == [lost]
    row = next(row for row in sweep.collect(plan).to_pylist() if row["cell_id"] == final)
    assert (row["status"], row["message"], row["loss"]) == ("failed", "diverged: so it is", None)
    left = [planned.cell.cell_id for unit in sweep.units_left(plan, retry_failed=True) for planned in unit.cells]
    assert sorted(left) == sorted([final, lost])


@pytest.mark.ray
def test_lanes_share_the_price(swept: Swept):
    one, two = (Budget.of(swept.plan, THROUGHPUT, lanes, 10.0) for lanes in (1, 2))
    assert one.num_cells == 6
    assert one.saved_flops > 0
    assert one.hours == pytest.approx(one.lane_hours)
    assert one.hours / 2 <= two.hours < one.hours
    assert one.cost == two.cost == pytest.approx(10 * one.lane_hours)


def test_a_sweep_without_a_constant_rate_is_refused():
    with pytest.raises(ConfigError, match=r"schedule=cosine: .* set it to wsd"):
        load_sweep_config("sweep_smoke", None, ["job.pretrain.optim.schedule=cosine"])


def test_histories_longer_than_what_is_measured_are_refused():
    with pytest.raises(ConfigError, match=r"histories of 8 events, .*probe_max_events=4: raise it to 8"):
        load_sweep_config("sweep_smoke", None, ["evaluation.probe_max_events=4"])


def test_one_command_at_a_time_has_a_working_directory(tmp_path: Path):
    with sweep.sole_command(tmp_path):
        other = sweep.sole_command(tmp_path)
        with pytest.raises(ConfigError, match="another `userrep sweep` works in"):
            other.__enter__()
    with sweep.sole_command(tmp_path):
        pass


def test_room_is_that_of_the_node_with_the_least_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    total = psutil.virtual_memory().total
    assert find_room(LanesConfig(num_workers=2, threads=2), is_verbose=False) == Room(2, USABLE_MEMORY * total / 4)
    assert find_room(LanesConfig(num_lanes=1), is_verbose=False) == Room(1, USABLE_MEMORY * total)


def test_an_empty_directory_holds_no_sweep(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no sweep"):
        sweep.replan(tmp_path)


@pytest.mark.parametrize("name", SWEEP_CONFIGS)
def test_named_sweeps_are_complete(name: str):
    config = SWEEP_CONFIGS[name]()
    assert type(config).parse(config.model_dump(mode="json")) == config
    assert (SWEEP_CONFIGS[name].__doc__ or "").strip()
