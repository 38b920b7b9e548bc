"""A cell of three tasks that a tiny network can learn, and what it leaves."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file

from userrep.data.tasks import ItemSequences, Task, TaskSet, TaskSplit, next_item_task, split_samples
from userrep.training.backbones import NextItNetBackbone
from userrep.training.cell_points import Point
from userrep.training.cells import METHOD_FILE, Cell, CellResult, ContinualConfig, Lesson, TaskTraining
from userrep.training.continual import run_cell

NUM_USERS, NUM_ITEMS, LENGTH = 60, 13, 7
SPLIT = TaskSplit(validation=0.2, test=0.2)
ORDER = ("T1", "T2", "T3")


def tiny_tasks(seed: int = 0) -> TaskSet:
    """Items count up. T1 the next one, T2 two items that follow from the last one, T3 whether it is a high one."""
    rng = np.random.default_rng(seed)
    items = (rng.integers(0, NUM_ITEMS - 1, (NUM_USERS, 1)) + np.arange(LENGTH)) % (NUM_ITEMS - 1) + 1
    items[np.arange(LENGTH) < LENGTH - rng.integers(2, LENGTH + 1, (NUM_USERS, 1))] = 0
    user_ids = pa.array([f"user-{number}" for number in range(NUM_USERS)])
    item_ids = ("", *(f"item-{number}" for number in range(1, NUM_ITEMS)))
    sequences = ItemSequences(items.astype(np.int32), user_ids, item_ids)
    rows = np.arange(NUM_USERS)
    last = items[:, -1].astype(np.int64)
    targets = np.concatenate([last // 3, last // 3 + 1])
    tasks = (
        next_item_task("T1", sequences, SPLIT),
        _task("T2", "item", np.concatenate([rows, rows]), targets, sequences),
        _task("T3", "label", rows, last // 7, sequences),
    )
    return TaskSet(sequences, tasks, {})


def _task(name: str, kind: Any, rows: np.ndarray, labels: np.ndarray, sequences: ItemSequences) -> Task:
    classes = tuple(map(str, range(labels.max() + 1)))
    return Task(name, kind, rows, labels, classes, split_samples(rows, sequences.keys, SPLIT))


def tiny_cell(
    method: str = "teracon", order: tuple[str, ...] = ORDER, seed: int = 0, max_epochs: int = 2, **options: Any
) -> Cell:
    training = TaskTraining(batch_size=8, learning_rate=0.01, max_epochs=max_epochs)
    config = ContinualConfig(
        backbone=NextItNetBackbone(dim=8, dilations=(1, 2)), first=training, later=training, evaluation_batch_size=5
    )
    return Cell(method=method, options=options, order=order, seed=seed, training=config)


class Points(list[Point]):
    """A report that keeps what it is told, and stops the cell at a task if it is asked to."""

    def __init__(self, stop_at: str = "") -> None:
        super().__init__()
        self._stop_at = stop_at

    def __call__(self, point: Point) -> None:
        self.append(point)
        torch.rand(len(self))  # what others draw between two steps is of no influence
        if self._stop_at in point.tasks and "train/loss" in point.metrics:
            raise InterruptedError(f"stopped in {self._stop_at}")

    def of(self, prefix: str) -> list[Point]:
        """Points with a metric that starts so."""
        return [point for point in self if any(name.startswith(prefix) for name in point.metrics)]


def run_tiny(cell: Cell, directory: Path) -> tuple[Any, Points]:
    points = Points()
    return run_cell(cell, tiny_tasks(), directory, points), points


def method_state(directory: Path, number: int) -> dict[str, torch.Tensor]:
    state = load_file(directory / f"task-{number:02d}" / METHOD_FILE)
    return {name: value.clone() for name, value in state.items()}  # not the mapped file, which tests damage


def timeless(result: CellResult) -> list[dict[str, Any]]:
    """Lessons without what differs from run to run."""

    def strip(lesson: Lesson) -> dict[str, Any]:
        values = lesson.model_dump()
        del values["seconds"]
        for point in values["curve"]:
            del point["seconds"]
        return values

    return [strip(lesson) for lesson in result.lessons]


def assert_same_state(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert own.keys() == other.keys()
    for name, value in own.items():
        assert torch.equal(value, other[name]), name
