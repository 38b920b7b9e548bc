"""Cells of an experiment with continual tasks: what one is, and what its directory holds.

A cell is one method, one seed, one order of tasks. It is taught in lessons: one task each, or all tasks at once for a
joint method. A lesson's directory `task-00`, `task-01`, ... (by its last task) is committed when the lesson is over,
and never changes. Directories and results are read without a model.
"""

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file

from userrep.config import Config, ConfigError, digest_json
from userrep.data.tasks import Metric, Task, TaskSet
from userrep.manifest import (
    MANIFEST_NAME,
    IncompleteTableError,
    Manifest,
    describe_file,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.training.backbones import BackboneConfig, NextItNetBackbone
from userrep.training.objective import Precision

METHOD_FILE = "method.safetensors"
LESSON_FILE = "lesson.json"


class TaskTraining(Config):
    """How a task is trained."""

    batch_size: int = Field(ge=1)  # samples of a step, over all workers
    learning_rate: float = Field(gt=0, allow_inf_nan=False)
    max_epochs: int = Field(default=100, ge=1)  # of every phase


class ContinualConfig(Config):
    """What all cells of an experiment share.

    Source: Sein-Kim/TERACON@b48e074: batches of 32 for the first task and of 1,024 for later ones, learning rates 1e-3
    and 1e-4 (1e-3 for task 2 in the revised script), at most 10 epochs of task 1 and 100 of others, patience 5.
    Differs: sized for MovieLens 1M on a CPU. With 2,400 users to train on, batches of 1,024 would be three steps per
    epoch, so later tasks have batches of 128; and 10 epochs of task 1 are few, so 100 there too. The first task has the
    learning rate with the lowest validation loss of 3e-4, 1e-3 and 3e-3; later tasks are much the same with all three.
    """

    backbone: BackboneConfig = NextItNetBackbone(dim=64, dilations=(1, 4, 1, 4))
    first: TaskTraining = TaskTraining(batch_size=32, learning_rate=3e-3)  # task of the order
    later: TaskTraining = TaskTraining(batch_size=128, learning_rate=1e-3)  # tasks of the order
    # Epochs and steps without a lower validation loss, after both of which a phase ends. The steps are for small tasks:
    # with 2,400 samples five epochs are a hundred steps.
    patience: int = Field(default=5, ge=1)
    patience_steps: int = Field(default=300, ge=0)
    evaluation_batch_size: int = Field(default=256, ge=1)  # samples whose logits exist at a time
    precision: Precision = "float32"  # of the backbone's matrix products; weights, heads and losses are float32

    @property
    def reads_texts(self) -> bool:
        """Whether texts of the items have an influence."""
        return self.backbone.encoder is not None

    def of_task(self, number: int) -> TaskTraining:
        """Settings of a task by its place in the order, from 0."""
        return self.later if number else self.first

    def identity(self) -> dict[str, Any]:
        """All values that have an influence, as JSON has them: not the path of an encoder whose digest is known."""
        values, encoder = self.model_dump(mode="json"), self.backbone.encoder
        if encoder is not None and encoder.digest:
            del values["backbone"]["encoder"]["path"]
        return values


class Cell(Config):
    """One training run through an order of tasks; `content_hash()` identifies it, wherever its encoder lies."""

    method: str  # name in `continual/catalog.py`
    options: dict[str, Any] = Field(default_factory=dict)  # of the method
    order: tuple[str, ...] = Field(min_length=1)  # names of tasks, the first one is learned first
    seed: int = Field(default=0, ge=0, lt=2**32)
    training: ContinualConfig = ContinualConfig()

    @model_validator(mode="after")
    def _teaches_a_task_once(self) -> Self:
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order {list(self.order)} has a task twice: name every task once")
        return self

    @property
    def label(self) -> str:
        """Method and options, for people and as a key: cells of a label differ in seed, order or training alone."""
        options = ", ".join(f"{name}={self.options[name]}" for name in sorted(self.options))
        return f"{self.method}({options})" if options else self.method

    def identity(self) -> dict[str, Any]:
        """As of the training, and all else; a cell can be parsed from it."""
        return {**self.model_dump(mode="json"), "training": self.training.identity()}

    def content_hash(self) -> str:
        """Hex digest (12 characters) of the identity."""
        return digest_json(self.identity())

    def until(self, num_tasks: int) -> "Cell":
        """The cell that ends after so many tasks: of a method that is not joint, both have the same lessons so far."""
        return self.model_copy(update={"order": self.order[:num_tasks]})


class EpochScore(Config):
    """A point of an adaptation curve."""

    phase: str
    epoch: int  # epochs that were trained in the phase; 0: before the first one
    scores: dict[str, float]  # on validation users, of the lesson's tasks
    losses: dict[str, float]  # their cross-entropies, by which the best epoch is chosen
    seconds: float  # of training in the epoch, without validation


class Lesson(Config):
    """What a lesson leaves besides the method."""

    tasks: tuple[str, ...]  # that were taught
    scores: dict[str, float]  # on test users, of all tasks so far: a row of R
    metrics: dict[str, Metric]  # what these scores are
    curve: tuple[EpochScore, ...]
    similarity: tuple[tuple[float, ...], ...] | None = None  # of the tasks' masks, if there are any: (tasks, tasks)
    num_steps: int  # optimizer steps of the cell up to its end
    seconds: float  # with validation and evaluation


@dataclass(frozen=True)
class CellResult:
    """What is known of a cell, which may not be finished.

    Attributes:
        cell: what was run.
        lessons: in order.
    """

    cell: Cell
    lessons: tuple[Lesson, ...]

    @property
    def is_complete(self) -> bool:
        """Whether all tasks have been taught."""
        return num_taught(self.lessons) == len(self.cell.order)

    @property
    def scores_MM(self) -> np.ndarray:
        """R as in `evaluation/transfer.py`, float64 (M, M); NaN where there is no score, as in all rows but the last
        of a joint method.
        """
        scores_MM = np.full((len(self.cell.order),) * 2, np.nan)
        for end, lesson in enumerate(self.lessons, 1):
            row = num_taught(self.lessons[:end]) - 1
            for column, name in enumerate(self.cell.order[: row + 1]):
                scores_MM[row, column] = lesson.scores[name]
        return scores_MM


def num_taught(lessons: tuple[Lesson, ...]) -> int:
    """Tasks that were taught in lessons."""
    return sum(len(lesson.tasks) for lesson in lessons)


def choose_tasks(cell: Cell, tasks: TaskSet) -> tuple[Task, ...]:
    """The cell's tasks in its order.

    Raises:
        ConfigError: the data set has no such task.
    """
    known = {task.name: task for task in tasks.tasks}
    if unknown := [name for name in cell.order if name not in known]:
        raise ConfigError(f"order names {', '.join(unknown)}: the tasks of this data set are {', '.join(known)}")
    return tuple(known[name] for name in cell.order)


def lesson_directory(directory: Path, number: int) -> Path:
    """Where a cell keeps the lesson whose last task has this number."""
    return directory / f"task-{number:02d}"


def write_lesson(
    directory: Path, cell: Cell, data_digest: str, lesson: Lesson, number: int, state: Mapping[str, torch.Tensor]
) -> None:
    """Commits a lesson: all of it or nothing.

    Args:
        directory: of the cell.
        cell: that the lesson is of.
        data_digest: of the tasks so far, from `digest_prefixes`.
        lesson: what was measured.
        number: of its last task.
        state: the method's `state_dict`.
    """
    with staged_directory(lesson_directory(directory, number)) as staging:
        save_file(dict(state), staging / METHOD_FILE)
        (staging / LESSON_FILE).write_text(lesson.model_dump_json(indent=1))
        files = tuple(describe_file(staging, staging / name) for name in (METHOD_FILE, LESSON_FILE))
        inputs = {"tasks": data_digest}
        manifest = Manifest(table="lesson", stage="continual", config=cell.identity(), inputs=inputs, files=files)
        write_manifest(staging, manifest)


def read_cell(directory: Path) -> CellResult:
    """The intact lessons of a cell up to the first one that is missing or damaged; of that, a warning.

    Raises:
        IncompleteTableError: there is none.
    """
    cell: Cell | None = None
    lessons: tuple[Lesson, ...] = ()
    for path in sorted(directory.glob(f"task-*/{MANIFEST_NAME}")):
        try:
            manifest = read_manifest(path.parent)
            verify_files(path.parent, manifest)
        except IncompleteTableError as error:  # not OSError: what cannot be read now may be intact
            warnings.warn(f"lesson passed over, and all after it: {error}", stacklevel=2)
            break
        cell = Cell.parse(manifest.config)
        lesson = Lesson.model_validate_json((path.parent / LESSON_FILE).read_bytes())
        end = num_taught(lessons) + len(lesson.tasks)
        if path.parent != lesson_directory(directory, end - 1):
            break  # the one before it is missing
        lessons += (lesson,)
    if cell is None or not lessons:
        raise IncompleteTableError(f"{directory} holds no lesson of a cell: run it first")
    return CellResult(cell, lessons)


def continue_cell(directory: Path, cell: Cell, data_digests: tuple[str, ...]) -> tuple[Lesson, ...]:
    """The lessons from which a cell can go on; none in a new directory.

    Args:
        directory: of the cell.
        cell: to go on with.
        data_digests: of its tasks, from `digest_prefixes`.

    Raises:
        ConfigError: the directory is that of another cell, or the data of tasks that were taught have changed.
    """
    for number, data_digest in enumerate(data_digests):
        path = lesson_directory(directory, number)
        try:
            manifest = read_manifest(path)
        except IncompleteTableError:
            continue  # there is none, or `read_cell` says that it is damaged
        if manifest.config != cell.identity() or manifest.inputs != {"tasks": data_digest}:
            raise ConfigError(
                f"{path} belongs to a cell with another config or other data: give this cell a directory of its "
                "own, such as one named after its content_hash(), or delete this one to start anew"
            )
    try:
        return read_cell(directory).lessons
    except IncompleteTableError:
        return ()


def remove_lessons_after(directory: Path, lessons: tuple[Lesson, ...]) -> None:
    """Removes what follows the intact lessons of a cell: it was built on a lesson that is taught again."""
    kept = {lesson_directory(directory, num_taught(lessons[:end]) - 1) for end in range(1, len(lessons) + 1)}
    for path in directory.glob("task-*"):
        if path not in kept:
            shutil.rmtree(path)
