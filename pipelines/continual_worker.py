"""What a Ray Train worker of the stage `continual` runs: cell after cell, each with a spool of its metrics."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import ray.train
import ray.train.torch
import torch

from pipelines.continual_config import ContinualJobConfig
from userrep import storage
from userrep.losses.gather import rank
from userrep.manifest import MANIFEST_NAME, IncompleteTableError, write_json
from userrep.training.backbones import BackboneSource, open_backbone
from userrep.training.cell_points import Point
from userrep.training.cells import Cell, read_cell
from userrep.training.continual import run_cell
from userrep.training.fence import LINE_AGE_S, Attempt, current_attempt, start_attempt
from userrep.training.log_pieces import LogPieces, receive_log
from userrep.training.state import NonFiniteLossError
from userrep.training.tracking import SPOOL_NAME, MetricSpool

CELLS = "cells"  # in the directory of an experiment
FAILURE_NAME = "failure.json"  # of a cell that has diverged


def teach_cells(settings: dict[str, Any]) -> None:
    """What every worker runs: cell after cell; lessons that another one was taught, or a pulled model, are borrowed."""
    config, directory = ContinualJobConfig.parse(settings["config"]), Path(settings["directory"])
    local_workers = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config.workers.threads or max(1, len(os.sched_getaffinity(0)) // local_workers))
    # Raises where another job has the experiment; where only these workers were started again, the last ones may not
    # write any more.
    attempt = current_attempt(directory, settings["job"])
    if rank() == 0:
        attempt = start_attempt(directory, settings["job"], lambda: None)
    tasks_of, device = cache(config.build_tasks), str(ray.train.torch.get_device())

    @cache
    def backbones_of(seed: int) -> BackboneSource:
        return open_backbone(config.training.backbone, tasks_of(seed).sequences, device)

    with storage.private(directory) as own:  # where a mirror is, only this process writes to it
        storage.receive(own, f"{CELLS}/*/task-*")
        for planned in settings["cells"]:
            cell = Cell.parse(planned["cell"])
            cell_directory = own / Path(planned["directory"]).relative_to(directory)
            cell_directory.mkdir(parents=True, exist_ok=True)
            with _spooling(cell_directory, attempt) as write:

                def report(point: Point, write: Callable[[Point], None] = write) -> None:
                    if rank() == 0:
                        attempt.check(LINE_AGE_S)
                        write(point)

                lenders = [*sorted(cell_directory.parent.iterdir()), *map(Path, settings["lenders"])]
                try:
                    run_cell(
                        cell,
                        tasks_of(cell.seed),
                        cell_directory,
                        report,
                        device,
                        backbones_of(cell.seed),
                        lenders,
                        attempt.check,
                    )
                except NonFiniteLossError as error:  # on every rank; it would come again, and other cells can go on
                    if rank() == 0:
                        write_json(cell_directory / FAILURE_NAME, {"message": str(error), **error.evidence})
                        storage.send(cell_directory, FAILURE_NAME)


@contextmanager
def _spooling(directory: Path, attempt: Attempt) -> Iterator[Callable[[Point], None]]:
    """A function that spools the points of a cell, of an epoch with the means of its steps.

    In object storage, it also uploads at every epoch what there is of spool and lessons.

    They are numbered through the cell, not by optimizer steps: the end of a lesson and epoch 0 of the next one have the
    same.
    """
    try:
        number = sum(len(lesson.curve) + 1 for lesson in read_cell(directory).lessons)
    except IncompleteTableError:
        number = 0
    receive_log(directory / SPOOL_NAME)
    spool, steps = MetricSpool(directory / SPOOL_NAME), list[dict[str, float]]()
    pieces, pushed = LogPieces(directory / SPOOL_NAME, attempt.number), set[Path]()

    def upload() -> None:
        pieces.send()
        for lesson in {path.parent for path in directory.glob(f"task-*/{MANIFEST_NAME}")} - pushed:
            storage.push(lesson)
            pushed.add(lesson)

    def write(point: Point) -> None:
        nonlocal number
        if "train/loss" in point.metrics:
            steps.append(point.metrics)
            return
        number += 1
        means = {name: fmean(step.get(name, nan) for step in steps) for name in (steps[0] if steps else ())}
        spool.write(number, time.time_ns() // 1_000_000, point.metrics | means)
        steps.clear()
        upload()

    try:
        yield write
        if rank() == 0:
            upload()
    finally:
        spool.close()
