"""The second executor of a sweep: every cell is a Ray job of its own, whose submission id is the id of the cell.

A cell starts in a process of its own, so one that crashes takes nothing with it and Ray's own scheduler queues them;
it costs the start of a process for each cell, and cells that share a trunk do not share their steps.
"""

import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch
from ray.job_submission import JobStatus, JobSubmissionClient

from pipelines.console import Console
from pipelines.job_server import connect
from pipelines.sweep import replan
from pipelines.sweep_cell import UnitRun, is_finished, peak_flops_per_s, run_unit
from pipelines.sweep_plan import SweepPlan, Unit, planned_row
from pipelines.sweep_queue import FAILURE_NAME
from userrep.config import ConfigError
from userrep.manifest import write_json
from userrep.scaling.grid import PlannedCell
from userrep.training.cell_evaluation import CellEvaluation
from userrep.training.fence import start_attempt, take_over
from userrep.training.objective import ClueObjective
from userrep.training.state import NonFiniteLossError
from userrep.training.systems import build_state

POLL_INTERVAL_S = 2.0


def run_jobs(
    plan: SweepPlan,
    workdir: Path,
    address: str,
    python: str,
    console: Console,
    is_insecure: bool,
    units: list[Unit],
    tell: Callable[[], object],
) -> list[str]:
    """Submits every cell of the units, and waits for all of them. Passes no cell over.

    Submitting twice is harmless: a cell whose job waits or runs is left alone, of one that has ended without a result
    the job is submitted again.

    Args:
        plan: of the sweep.
        workdir: of the sweep, on storage that the cluster shares.
        address: of the cluster's job server, e.g. http://127.0.0.1:8265.
        python: interpreter on the cluster's machines, with this package.
        console: for progress.
        is_insecure: the job server may be spoken to in plain http on another machine.
        units: that are to be run.
        tell: is called now and then.

    Raises:
        ConfigError: a cell needs several workers, or the job server may not be spoken to (`job_server.connect`).
    """
    lanes = plan.config.lanes
    if lanes.num_workers != 1:
        raise ConfigError(
            f"lanes.num_workers={lanes.num_workers}: a job runs a cell in one process; leave --jobs-address out"
        )
    client = connect(address, console, is_insecure=is_insecure).client
    known = {job.submission_id: job for job in client.list_jobs()}
    cell_ids = [planned.cell.cell_id for unit in units for planned in unit.cells]
    for cell_id in cell_ids:
        job = known.get(cell_id)
        if job is not None and not job.status.is_terminal():
            continue
        if job is not None:
            client.delete_job(cell_id)
        words = [python, "-m", "pipelines.cli", "sweep", "cell", cell_id, "--workdir", str(workdir)]
        client.submit_job(
            entrypoint=shlex.join(words),
            submission_id=cell_id,
            entrypoint_num_cpus=lanes.threads,
            entrypoint_num_gpus=1 if lanes.use_gpu else None,
            metadata={"sweep": plan.config.name},
        )
    console.say(f"sweep: {len(cell_ids)} cells submitted to {address}")
    _wait(client, cell_ids, console, tell)
    for cell_id in cell_ids:
        directory = plan.cell_directory(cell_id)
        if not is_finished(directory) and not (directory / FAILURE_NAME).is_file():
            message = f"its job ended as {client.get_job_status(cell_id)}; see its log on the cluster"
            directory.mkdir(parents=True, exist_ok=True)
            write_json(directory / FAILURE_NAME, {"message": message, "is_final": False})
    return []


def _wait(client: JobSubmissionClient, cell_ids: list[str], console: Console, tell: Callable[[], object]) -> None:
    with console.progress("sweep", "cells") as advance:
        left = set(cell_ids)
        while left:
            states = {job.submission_id: job.status for job in client.list_jobs() if job.submission_id in left}
            left = {cell_id for cell_id in left if cell_id in states and not states[cell_id].is_terminal()}
            running = sum(state == JobStatus.RUNNING for state in states.values())
            done = len(cell_ids) - len(left)
            advance(done, len(cell_ids), done, f"{running} jobs running")
            if left:
                tell()
                time.sleep(POLL_INTERVAL_S)


def run_one(workdir: Path, cell_id: str) -> None:
    """Runs one cell in this process: what a job does. One that is finished is not run again.

    Raises:
        ConfigError: nothing was planned there, or there is no such cell.
        RuntimeError: it has diverged.
    """
    plan = replan(workdir)
    found = next((planned for planned in plan.cells if planned.cell.cell_id == cell_id), None)
    if found is None:
        raise ConfigError(f"sweep {plan.config.name} has no cell {cell_id}: `userrep sweep status` lists them")
    if is_finished(plan.cell_directory(cell_id)):
        return
    try:
        _run(plan, found)
    except NonFiniteLossError as error:
        message = f"diverged: {error}"
        write_json(plan.cell_directory(cell_id) / FAILURE_NAME, {"message": message, "is_final": True})
        raise RuntimeError(f"cell {cell_id} {message}") from error


def _run(plan: SweepPlan, planned: PlannedCell) -> None:
    cell, lanes = planned.cell, plan.config.lanes
    config = plan.pretrain_config(cell)
    torch.set_num_threads(lanes.threads)
    device = torch.device("cuda" if lanes.use_gpu else "cpu")
    directory = plan.cell_directory(cell.cell_id)
    directory.mkdir(parents=True, exist_ok=True)
    state = build_state(config, plan.shards)
    state.model.to(device)
    take_over(directory, cell.cell_id)
    unit = UnitRun(
        cells=(cell,),
        rows={cell.cell_id: planned_row(planned, plan.config.name)},
        model_share=planned.model_flops / planned.flops,
        directory=plan.directory,
        config=config,
        shards=plan.shards,
        attempt=start_attempt(directory, cell.cell_id, lambda: None),
        peak_flops_per_s=peak_flops_per_s(device, config.precision),
        device=torch.cuda.get_device_name(device) if lanes.use_gpu else "cpu",
        checkpoint_s=lanes.checkpoint_s,
        fork=directory / "fork",
    )
    objective = ClueObjective(state.model, 0, config.loss, lanes.memory, config.precision)
    evaluation = CellEvaluation(plan.shards, plan.config.evaluation, config.views)
    run_unit(unit, state, objective, evaluation, lambda step, num_steps, loss: None, lambda cell_id: None)
