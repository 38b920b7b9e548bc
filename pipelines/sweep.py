"""`userrep sweep run`: the cells of a plan, then the table of runs.

A cell that is finished is never run again, whatever has killed the sweep in between: its result is committed in one
step, by the one attempt that has the right to. MLflow has a run for the sweep and, below it, one for each cell.
"""

import fcntl
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import ingest, tokenize
from pipelines.console import Console
from pipelines.job import Job
from pipelines.mlflow_store import tracking_uri
from pipelines.session import ray_session
from pipelines.sweep_cell import is_finished, read_row
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_plan import SWEEP, Room, SweepPlan, Unit, make_plan, planned_row
from pipelines.sweep_queue import FAILURE_NAME
from userrep.config import ConfigError
from userrep.manifest import Manifest, describe_file, staged_directory, write_json, write_manifest
from userrep.publishing.connection import RegistryError, check_uri
from userrep.schema import RUNS
from userrep.training.cell_evaluation import CellEvaluation
from userrep.training.follower import Follower
from userrep.training.replay import living_job, send_run
from userrep.training.run_record import RunRecord
from userrep.training.tracking import SPOOL_NAME

STAGE = "sweep"
LOCK_NAME = "command.lock"
RUNS_TABLE, RUNS_FILE = "runs", "runs.parquet"


@dataclass(frozen=True)
class Outcome:
    """What a command has run.

    Attributes:
        runs: table of all cells of the plan.
        passed_over: ids of cells for which there was no time.
        failures: of cells that failed: `message`, and whether it `is_final`, as of a run that diverges.
    """

    runs: pa.Table
    passed_over: list[str]
    failures: dict[str, dict[str, Any]]


# Runs units, and now and then calls a function that tells MLflow of finished cells; returns cells that it passed over.
Executor = Callable[[list[Unit], Callable[[], object]], list[str]]


def prepare(config: SweepConfig, workdir: Path, console: Console, room: Room | None = None) -> SweepPlan:
    """Makes the tokenized table where it is missing, and plans the sweep on it."""
    job = Job(config.job, workdir, console)
    workdir.mkdir(parents=True, exist_ok=True)
    tables = (job.path(ingest.TABLE), job.path(tokenize.TABLE))
    if all((path / "manifest.json").is_file() for path in tables):
        ingest.run(job)  # says that it is complete, or makes it anew where the config has changed
        tokenize.run(job)
    else:
        with ray_session(console.is_verbose):
            ingest.run(job)
            tokenize.run(job)
    plan = make_plan(config, job.path(tokenize.TABLE), workdir, room or Room())
    plan.directory.mkdir(parents=True, exist_ok=True)
    write_json(plan.directory / "config.json", config.model_dump(mode="json"))
    rows = [planned_row(planned, config.name) for planned in plan.cells]
    write_json(plan.directory / "plan.json", {"name": config.name, "cells": rows})
    return plan


def replan(workdir: Path) -> SweepPlan:
    """The sweep that was planned last in a working directory.

    Raises:
        ConfigError: there is none.
    """
    path = workdir / SWEEP / "config.json"
    if not path.is_file():
        raise ConfigError(f"{workdir} holds no sweep: pass the --workdir of `userrep sweep plan` or `run`")
    config = SweepConfig.parse(json.loads(path.read_text()))
    return make_plan(config, workdir / tokenize.TABLE, workdir, Room())


def run(plan: SweepPlan, workdir: Path, console: Console, execute: Executor, retry_failed: bool = False) -> Outcome:
    """Runs the cells that are not finished, and commits the table of runs.

    Args:
        plan: of the sweep.
        workdir: of the sweep.
        console: for progress.
        execute: where they are run: `pipelines.sweep_lanes` or `pipelines.sweep_jobs`.
        retry_failed: also run cells again that diverged.
    """
    uri = tracking_uri(workdir)
    check_uri(uri, create=True)
    units = units_left(plan, retry_failed)
    console.say(f"sweep: {len(plan.cells)} cells, {sum(len(unit.cells) for unit in units)} to run")
    passed_over, sent = list[str](), set[str]()
    with living_job(plan.directory):
        names = {"stage": STAGE, "name": plan.config.name}
        record = RunRecord.start(plan.directory, plan.config.experiment, _tracked_config(plan), **names)
        follower = Follower(plan.directory, uri) if units else None  # what is over is sent below
        status = "FAILED"
        try:
            if units:
                CellEvaluation(plan.shards, plan.config.evaluation, plan.config.job.pretrain.views)  # raises in time
                passed_over = execute(units, lambda: send_cells(plan, record, uri, sent))
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            reason = follower.finish(status) if follower else None
            record.model_copy(update={"status": status}).write(plan.directory)
            table = collect(plan)
            write_runs(plan, table)
    reason = reason or send_cells(plan, record, uri, sent)
    if reason is not None:
        console.say(
            f"sweep: MLflow does not have all runs ({reason}); "
            f"`userrep sync-tracking --workdir {workdir}` sends the rest"
        )
    failed = [row["cell_id"] for row in table.to_pylist() if row["status"] == "failed"]
    failures = {cell_id: read_failure(plan.cell_directory(cell_id)) for cell_id in failed}
    return Outcome(table, passed_over, {cell_id: failure for cell_id, failure in failures.items() if failure})


@contextmanager
def sole_command(workdir: Path) -> Iterator[None]:
    """Holds the right to plan and run a sweep in a working directory; the kernel lets it go when the process dies.

    Raises:
        ConfigError: another command has it.
    """
    (workdir / SWEEP).mkdir(parents=True, exist_ok=True)
    with (workdir / SWEEP / LOCK_NAME).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"another `userrep sweep` works in {workdir}: watch it with `userrep sweep status`, or use another "
                "--workdir"
            ) from error
        yield


def units_left(plan: SweepPlan, retry_failed: bool = False) -> list[Unit]:
    """What is still to be run: no finished cell, and none that would fail again."""
    done = set()
    for planned in plan.cells:
        directory = plan.cell_directory(planned.cell.cell_id)
        failure = read_failure(directory)
        if is_finished(directory) or (failure is not None and failure["is_final"] and not retry_failed):
            done.add(planned.cell.cell_id)
        elif failure is not None:
            (directory / FAILURE_NAME).unlink()
    left = [unit.without(done) for unit in plan.units]
    return [unit for unit in left if unit.cells]


def read_failure(directory: Path) -> dict[str, Any] | None:
    """Why a cell failed; None: it did not."""
    path = directory / FAILURE_NAME
    return json.loads(path.read_text()) if path.is_file() else None


def collect(plan: SweepPlan) -> pa.Table:
    """The table of runs: finished, failed and planned cells of the plan."""
    rows = []
    for planned in plan.cells:
        row = planned_row(planned, plan.config.name)
        directory = plan.cell_directory(row["cell_id"])
        if (measured := read_row(directory)) is not None:
            row = row | {name: value for name, value in measured.items() if name not in ("factor", "sweep")}
        elif (failure := read_failure(directory)) is not None:
            row = row | {"status": "failed", "message": failure["message"]}
        elif not plan.fits(planned):
            row = row | {"message": f"needs {planned.memory_bytes / 2**30:.1f} GiB, which a worker does not have"}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=RUNS)


def write_runs(plan: SweepPlan, table: pa.Table) -> None:
    """Commits the table of runs."""
    with staged_directory(plan.directory / RUNS_TABLE) as staging:
        pq.write_table(table, staging / RUNS_FILE)
        files = (describe_file(staging, staging / RUNS_FILE, table.num_rows),)
        config = plan.config.model_dump(mode="json")
        write_manifest(staging, Manifest(table="runs", stage=STAGE, config=config, files=files))


def send_cells(plan: SweepPlan, record: RunRecord, uri: str, sent: set[str]) -> str | None:
    """Sends the run of the sweep's finished cells to MLflow, but for those that were sent.

    Returns:
        Why MLflow does not have them all; None: it has. That it is away is no reason to fail.
    """
    due = []
    for planned in plan.cells:
        cell_id = planned.cell.cell_id
        directory = plan.cell_directory(cell_id)
        if cell_id in sent or not is_finished(directory) or not (directory / SPOOL_NAME).exists():
            continue
        values = planned.cell.model_dump(mode="json")
        name = f"{planned.factor} N {planned.parameters['non_embedding']:,} {cell_id}"
        RunRecord.start(
            directory, plan.config.experiment, values, stage=STAGE, name=name, parent=record.key, status="FINISHED"
        )
        due.append(directory)
    for directory in due:  # records first, by which `userrep sync-tracking` can send what is not sent here
        try:
            send_run(directory, uri, waits=True)
        except (RegistryError, OSError) as error:
            return str(error)
        sent.add(directory.name)
    return None


def _tracked_config(plan: SweepPlan) -> dict[str, Any]:
    config = plan.config
    values = config.model_dump(mode="json")
    return {name: values[name] for name in ("name", "grids", "ladder", "evaluation")}
