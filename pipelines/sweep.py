"""`userrep sweep run`: the cells of a plan in warm lanes, then the table of runs, the fits and the report.

A cell that is finished is never run again, whatever has killed the sweep in between: its result is committed in one
step, by the one attempt that has the right to. MLflow has a run for the sweep and, below it, one for each cell.
"""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from pipelines import ingest, tokenize
from pipelines.console import Console
from pipelines.job import Job
from pipelines.mlflow_store import tracking_uri
from pipelines.session import ray_session
from pipelines.sweep_cell import is_finished, read_row
from pipelines.sweep_config import SweepConfig
from pipelines.sweep_lane import run_lane
from pipelines.sweep_plan import SweepPlan, Throughput, Unit, make_plan, planned_row
from pipelines.sweep_queue import FAILURE_NAME, CellQueue, Priced
from userrep.config import ConfigError
from userrep.manifest import Manifest, describe_file, staged_directory, write_json, write_manifest
from userrep.publishing.connection import RegistryError, check_uri
from userrep.schema import RUNS
from userrep.training.follower import Follower
from userrep.training.replay import living_job, send_run
from userrep.training.run_record import RunRecord
from userrep.training.tracking import SPOOL_NAME

STAGE = "sweep"
RUNS_TABLE, RUNS_FILE = "runs", "runs.parquet"
POLL_INTERVAL_S = 1.0
SEND_INTERVAL_S = 60.0  # between two looks for finished cells that MLflow does not have


@dataclass(frozen=True)
class Outcome:
    """What a command has run.

    Attributes:
        runs: table of all cells of the plan.
        passed_over: ids of cells for which there was no time.
        failed: ids of cells that failed, and why.
    """

    runs: pa.Table
    passed_over: list[str]
    failed: dict[str, str]


def prepare(config: SweepConfig, workdir: Path, console: Console, num_lanes: int = 0) -> SweepPlan:
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
    plan = make_plan(config, job.path(tokenize.TABLE), workdir, num_lanes or config.lanes.num_lanes or 1)
    plan.directory.mkdir(parents=True, exist_ok=True)
    write_json(plan.directory / "config.json", config.model_dump(mode="json"))
    rows = [planned_row(planned, config.name) for planned in plan.cells]
    write_json(plan.directory / "plan.json", {"name": config.name, "cells": rows})
    return plan


def run(
    plan: SweepPlan,
    throughput: Throughput,
    workdir: Path,
    console: Console,
    max_hours: float | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Runs the cells that are not finished.

    Args:
        plan: of the sweep.
        throughput: that cells are priced by.
        workdir: of the sweep.
        console: for progress.
        max_hours: that the command may take; cells that would not end in time are left out.
        retry_failed: also run cells again that diverged.

    Raises:
        ConfigError: the cluster has no room for a single lane.
        RuntimeError: no lane could be started.
    """
    uri = tracking_uri(workdir)
    check_uri(uri, create=True)
    units = units_left(plan, retry_failed)
    num_left = sum(len(unit.cells) for unit in units)
    console.say(f"sweep: {len(plan.cells)} cells, {num_left} to run")
    passed_over: list[str] = []
    with living_job(plan.directory):
        names = {"stage": STAGE, "name": plan.config.name}
        record = RunRecord.start(plan.directory, plan.config.experiment, _tracked_config(plan), **names)
        follower = Follower(plan.directory, uri)
        try:
            if units:
                priced = [
                    Priced(unit_values(plan, unit, throughput), plan.seconds_of(unit, throughput)) for unit in units
                ]
                with ray_session(console.is_verbose):
                    passed_over = _run_lanes(plan, priced, max_hours, uri, record, console)
        finally:
            table = collect(plan)
            write_runs(plan, table)
            reason = follower.finish("FINISHED")
            record.model_copy(update={"status": "FINISHED"}).write(plan.directory)
    reason = reason or send_cells(plan, record, uri, set())
    if reason is not None:
        console.say(
            f"sweep: MLflow does not have all runs ({reason}); "
            f"`userrep sync-tracking --workdir {workdir}` sends the rest"
        )
    failed = {row["cell_id"]: row["message"] for row in table.to_pylist() if row["status"] == "failed"}
    return Outcome(table, passed_over, failed)


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


def unit_values(plan: SweepPlan, unit: Unit, throughput: Throughput) -> dict[str, Any]:
    """What a lane needs to know of a unit, JSON-plain."""
    lanes, longest = plan.config.lanes, unit.cells[-1]
    seconds = plan.seconds_of(unit, throughput)
    sizes = f"N {longest.parameters['non_embedding']:,} S {longest.cell.max_events} B {longest.cell.global_batch_size}"
    return {
        "trunk_id": unit.trunk_id,
        "label": sizes,
        "config": plan.pretrain_config(longest.cell).model_dump(mode="json"),
        "model_share": longest.model_flops / longest.flops,
        "timeout_s": max(lanes.min_timeout_s, lanes.timeout_factor * seconds),
        "cells": [
            {
                "cell_id": planned.cell.cell_id,
                "cell": planned.cell.model_dump(mode="json"),
                "row": planned_row(planned, plan.config.name),
            }
            for planned in unit.cells
        ],
    }


def count_lanes(plan_lanes: int, cpus: float, gpus: float, num_workers: int, threads: int, use_gpu: bool) -> int:
    """Lanes that a cluster has room for, at most as many as are wanted.

    Raises:
        ConfigError: for none.
    """
    room = int(cpus // (num_workers * threads))
    if use_gpu:
        room = min(room, int(gpus // num_workers))
    if room < 1:
        raise ConfigError(
            f"a lane of {num_workers} workers with {threads} CPUs{' and a GPU' if use_gpu else ''} each does not fit "
            f"into the cluster's {cpus:g} CPUs and {gpus:g} GPUs: lower lanes.num_workers or lanes.threads"
        )
    return min(plan_lanes or room, room)


def _run_lanes(
    plan: SweepPlan, priced: list[Priced], max_hours: float | None, uri: str, record: RunRecord, console: Console
) -> list[str]:
    """Runs lanes until the queue is empty; returns the cells that were passed over."""
    lanes, resources = plan.config.lanes, ray.cluster_resources()
    num_lanes = count_lanes(
        lanes.num_lanes,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        lanes.num_workers,
        lanes.threads,
        lanes.use_gpu,
    )
    num_lanes = min(num_lanes, len(priced))
    seconds = None if max_hours is None else 3600 * max_hours
    queue: Any = (
        cast(Any, ray.remote(CellQueue)).options(num_cpus=0).remote(plan.directory, priced, lanes.retries, seconds)
    )
    settings = {
        "directory": str(plan.directory),
        "shards": str(plan.shards),
        "job": uuid.uuid4().hex,
        "lanes": lanes.model_dump(mode="json"),
        "config": plan.config.model_dump(mode="json"),
        "num_units": len(priced),
    }
    start = cast(Any, ray.remote(run_lane)).options(num_cpus=0, max_retries=0)
    running = [start.remote(settings, queue, lane) for lane in range(num_lanes)]
    total = sum(len(p.cell_ids) for p in priced)
    sent: set[str] = set()
    looked_s = time.monotonic()
    with console.progress("sweep", "cells") as advance:
        while running:
            over, running = ray.wait(running, num_returns=1, timeout=POLL_INTERVAL_S)
            for reason in ray.get(over):
                if reason:
                    console.say(f"sweep: a lane has ended: {reason}")
            status: dict[str, Any] = ray.get(queue.status.remote())
            advance(status["finished"], total, status["finished"], describe_lanes(status))
            if time.monotonic() - looked_s > SEND_INTERVAL_S:
                send_cells(plan, record, uri, sent)
                looked_s = time.monotonic()
    status = ray.get(queue.status.remote())
    if status["waiting"]:
        raise RuntimeError(
            f"sweep: all lanes have ended with {status['waiting']} cells waiting; the same command goes on"
        )
    return status["passed_over"]


def describe_lanes(status: dict[str, Any]) -> str:
    """What every lane is at, and the time that is left."""
    lanes = [
        f"[{lane['label']}: {lane['step']}/{lane['num_steps']} {lane['note']}]" for lane in status["lanes"].values()
    ]
    failed = f", {status['failed']} failed" if status["failed"] else ""
    return f"{' '.join(lanes)}{failed}; by price, {status['left_s'] / 60:.0f} min left"


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
        try:
            send_run(directory, uri, waits=True)
        except RegistryError as error:
            return str(error)
        sent.add(cell_id)
    return None


def _tracked_config(plan: SweepPlan) -> dict[str, Any]:
    config = plan.config
    values = config.model_dump(mode="json")
    return {name: values[name] for name in ("name", "grids", "ladder", "evaluation")}
