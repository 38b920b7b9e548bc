"""A cell of a sweep: how it is trained, measured and committed by a worker, and what is read of it afterwards."""

import json
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from userrep.losses.gather import all_gather, world_size
from userrep.manifest import (
    IncompleteTableError,
    Manifest,
    describe_file,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.scaling.grid import Cell
from userrep.training.cell_evaluation import CellEvaluation
from userrep.training.checkpoint import MODEL_FILE, OPTIMIZER_FILE, Snapshot, restore_snapshot
from userrep.training.fence import Attempt
from userrep.training.optim import decay_start
from userrep.training.settings import CluePretraining
from userrep.training.state import TrainState
from userrep.training.tracking import SPOOL_NAME, MetricSpool
from userrep.training.trunk import Hooks, Progress, run_trunk

RESULT = "result"  # directory of what a finished cell is; it never changes
ROW_NAME = "run.json"
PROGRESS_NAME = "progress.json"
MAX_POINTS = 200  # of a cell's training loss in MLflow


@dataclass(frozen=True)
class UnitRun:
    """A unit as a worker runs it.

    Attributes:
        cells: ascending by number of steps, those that are still to be run.
        rows: what the table of runs says of each so far, by cell id.
        model_share: share of the operations that are not done twice, for mfu.
        directory: of the sweep.
        config: of the longest run.
        shards: tokenized table.
        attempt: at the trunk; None on ranks that write nothing.
        peak_flops_per_s: of all workers of the lane.
        device: its name, for the table.
        checkpoint_s: seconds of steps that a kill may cost.
        fork: directory of the trunk's checkpoint.
    """

    cells: tuple[Cell, ...]
    rows: dict[str, dict[str, Any]]
    model_share: float
    directory: Path
    config: CluePretraining
    shards: Path
    attempt: Attempt | None
    peak_flops_per_s: float
    device: str
    checkpoint_s: float
    fork: Path


def run_unit(
    unit: UnitRun,
    state: TrainState,
    objective: nn.Module,
    evaluation: CellEvaluation | None,
    beat: Callable[[int, int, float], None],
    committed: Callable[[str], None],
) -> None:
    """Trains, measures and commits the cells of a unit. A collective over the workers of a lane.

    Args:
        unit: what to run.
        state: new; the checkpoint of the trunk is restored where there is one.
        objective: over the state's model.
        evaluation: on rank 0, which alone measures.
        beat: is told of steps taken, steps of the run, and training loss.
        committed: is told the id of every cell that was committed.
    """
    progress, saved_s = Progress(), 0.0
    durations = [cell.num_steps for cell in unit.cells]
    _agree(state)  # from here on rank 0 has the right to write, and nobody else does
    if (unit.fork / "manifest.json").is_file():
        restored = restore_fork(unit.fork, state, durations[0], unit.config)
        progress = restored or progress
        saved_s = progress.seconds
    _agree(state)
    cell_of = {cell.num_steps: cell for cell in unit.cells}

    def glance(state: TrainState) -> float:
        return evaluation.pool_loss(state.model, unit.cells[0].max_events) if evaluation else 0.0

    def on_trunk(state: TrainState, progress: Progress) -> None:
        nonlocal saved_s
        if unit.attempt is not None and progress.seconds - saved_s >= unit.checkpoint_s:
            saved_s = progress.seconds
            save_fork(unit.fork, state, progress, unit.attempt)

    def finished(num_steps: int, state: TrainState, progress: Progress) -> None:
        cell = cell_of[num_steps]
        if evaluation is not None and unit.attempt is not None:
            commit_cell(unit, cell, state, progress, evaluation)
        committed(cell.cell_id)

    def step(num_steps: int, state: TrainState, progress: Progress) -> None:
        beat(state.step, num_steps, progress.losses[-1])

    hooks = Hooks(step, glance, on_trunk, finished)
    run_trunk(unit.config, durations, state, objective, unit.shards, hooks, progress)
    if unit.attempt is not None:
        shutil.rmtree(unit.fork, ignore_errors=True)


def _agree(state: TrainState) -> None:
    """Waits for all workers of a lane, which must stand at the same step.

    Raises:
        RuntimeError: they do not.
    """
    steps = all_gather(torch.tensor([state.step], device=state.model.logit_scale.device)).tolist()
    if len(set(steps)) > 1:
        raise RuntimeError(f"workers stand at steps {steps}: a sweep must be on storage that all of them share")


def commit_cell(unit: UnitRun, cell: Cell, state: TrainState, progress: Progress, evaluation: CellEvaluation) -> None:
    """Measures a finished run and commits what is known of it, in one step. Rank 0 alone."""
    assert unit.attempt is not None
    directory = unit.directory / "cells" / cell.cell_id
    unit.attempt.check()
    if is_finished(directory):  # by an attempt that was given up for lost, before it could say so
        return
    started = time.perf_counter()
    measured = evaluation.measure(state.model, cell.max_events)
    row = unit.rows[cell.cell_id]
    flops_per_s = row["flops"] / progress.seconds
    row = row | {
        "status": "finished",
        **asdict(measured),
        "curve": [
            {"step": step, "flops": row["flops"] / cell.num_steps * step, "loss": loss} for step, loss in progress.curve
        ],
        "train_loss": fmean(progress.losses[-max(1, cell.num_steps // 10) :]),
        "train_s": progress.seconds,
        "evaluate_s": time.perf_counter() - started,
        "flops_per_s": flops_per_s,
        "mfu": flops_per_s * unit.model_share / unit.peak_flops_per_s,
        "num_workers": world_size(),
        "device": unit.device,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": version("userrep"),
    }
    unit.attempt.check()
    _spool(directory / SPOOL_NAME, progress, row)
    with staged_directory(directory / RESULT) as staging:
        (staging / ROW_NAME).write_text(json.dumps(row, indent=1))
        files = (describe_file(staging, staging / ROW_NAME),)
        config = cell.model_dump(mode="json")
        write_manifest(staging, Manifest(table="cell", stage="sweep", config=config, files=files))
        unit.attempt.check()


def is_finished(directory: Path) -> bool:
    """Whether a cell has been committed, and its result is intact."""
    return read_row(directory) is not None


def read_row(directory: Path) -> dict[str, Any] | None:
    """The row of a finished cell; None where it is not finished, or damaged."""
    try:
        manifest = read_manifest(directory / RESULT)
        verify_files(directory / RESULT, manifest)
    except IncompleteTableError:
        return None
    row = json.loads((directory / RESULT / ROW_NAME).read_text())
    return row | {"finished_at": datetime.fromisoformat(row["finished_at"])}


def _spool(path: Path, progress: Progress, row: dict[str, Any]) -> None:
    """Metrics of a cell for MLflow: a thinned training curve, the points on the way, and what was measured."""
    now_ms = time.time_ns() // 1_000_000
    points: dict[int, dict[str, float]] = {}
    steps = np.unique(np.linspace(1, len(progress.losses), MAX_POINTS).round().astype(int)).tolist()
    for step in steps:
        points.setdefault(step, {})["train/loss"] = progress.losses[step - 1]
    for step, loss in progress.curve:
        points.setdefault(step, {})["val/loss"] = loss
    names = ("loss", "loss_as_trained", "best_scale", "recall_at_1", "recall_at_10")
    last = points.setdefault(len(progress.losses), {})
    last.update({f"test/{name}": row[name] for name in names})
    for kind in ("losses", "scores"):
        last.update({f"downstream_{kind}/{task}": value for task, value in row[f"downstream_{kind}"].items()})
    last.update({f"speed/{name}": row[name] for name in ("flops_per_s", "mfu", "train_s", "evaluate_s")})
    path.unlink(missing_ok=True)
    with closing(MetricSpool(path)) as spool:
        for step in sorted(points):
            spool.write(step, now_ms, points[step])


def save_fork(directory: Path, state: TrainState, progress: Progress, attempt: Attempt) -> None:
    """Commits the state of a trunk in place of the one before."""
    snapshot = Snapshot.take(state)
    with staged_directory(directory) as staging:
        save_file(snapshot.model, staging / MODEL_FILE)
        save_file(snapshot.optimizer, staging / OPTIMIZER_FILE)
        facts = {"progress": snapshot.progress, **asdict(progress)}
        (staging / PROGRESS_NAME).write_text(json.dumps(facts))
        files = tuple(describe_file(staging, path) for path in sorted(staging.iterdir()))
        write_manifest(staging, Manifest(table="fork", stage="sweep", config={}, files=files))
        attempt.check()


def restore_fork(directory: Path, state: TrainState, shortest: int, config: CluePretraining) -> Progress | None:
    """Restores a trunk; None, and the state as it was, where the checkpoint is damaged or of no use.

    Args:
        directory: of the checkpoint.
        state: to restore into.
        shortest: steps of the shortest run that is left, whose decay must begin later.
        config: of the run.
    """
    try:
        verify_files(directory, read_manifest(directory))
    except IncompleteTableError:
        return None
    facts = json.loads((directory / PROGRESS_NAME).read_text())
    if facts["progress"]["step"] > decay_start(shortest, config.optim):
        return None
    restore_snapshot(
        Snapshot(load_file(directory / MODEL_FILE), load_file(directory / OPTIMIZER_FILE), facts["progress"]), state
    )
    return Progress(facts["losses"], [(int(step), loss) for step, loss in facts["curve"]], facts["seconds"])


@torch.no_grad()
def peak_flops_per_s(device: torch.device, precision: str) -> float:
    """What this process's device does in products of large matrices: the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    one, other = (torch.randn(size, size, device=device, dtype=getattr(torch, precision)) for _ in range(2))
    best = 0.0
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        torch.mm(one, other)
        _wait(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
