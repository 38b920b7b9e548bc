"""Teaches a cell its tasks one after another, and measures all of them after each. No Ray in here.

Everything that is drawn is a function of the cell's seed and of what it is drawn for: an epoch's order of (task, phase,
epoch), what a step draws of (task, phase, epoch, step, rank). So a cell that was stopped after any task goes on bit for
bit. On several ranks every rank takes a part of each batch, and the gradient is that of the whole batch up to rounding,
with these exceptions: what a method draws in a step, it draws on every rank for its part alone (TERACON rehearses users
of each part, at least one of every past task); and of a `next_item` task ranks are weighted by how many items they
predict, which is not exact for a loss that is a mean of something else (pads; the rehearsal of past tasks).

Source: Sein-Kim/TERACON@b48e074:train_teracon.py. Differs: the last, smaller batch of an epoch is trained on (there
dropped), and nothing is dropped in evaluation; epochs are compared by their cross-entropy on validation users (there by
accuracy): of 150 users with one right item each, MRR and accuracy tell little; the best parameters are those of a
trained epoch, never of epoch 0.

Legend: `B` samples of a batch, `M` tasks.
"""

import math
import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

import numpy as np
import torch

from userrep.config import ConfigError
from userrep.continual.catalog import build_method
from userrep.continual.method import Method, Progress
from userrep.continual.network import TaskSpec
from userrep.data.task_digests import digest_prefixes
from userrep.data.tasks import Task, TaskSet
from userrep.losses.gather import all_gather, rank
from userrep.training.backbones import BackboneSource, open_backbone
from userrep.training.borrowing import borrow_lessons
from userrep.training.cell_points import Point, Report
from userrep.training.cells import (
    METHOD_FILE,
    Cell,
    CellResult,
    EpochScore,
    Lesson,
    choose_tasks,
    continue_cell,
    lesson_directory,
    num_taught,
    remove_lessons_after,
    write_lesson,
)
from userrep.training.checkpoint import load_model
from userrep.training.continual_step import Optimizers, open_optimizers, take_step
from userrep.training.state import NonFiniteLossError
from userrep.training.task_scores import Scored, mask_similarity, score_task


class _Draw(IntEnum):
    """What random numbers are drawn for; each has a stream of its own."""

    INIT = 0
    TASK = 1
    PHASE = 2
    ORDER = 3
    STEP = 4


def run_cell(
    cell: Cell,
    tasks: TaskSet,
    directory: Path,
    report: Report,
    device: str = "cpu",
    backbones: BackboneSource | None = None,
    lenders: Sequence[Path] = (),
    check: Callable[[], None] = lambda: None,
) -> CellResult:
    """Runs a cell, or what is left of it. A collective over all ranks, which must see the same directory.

    Args:
        cell: what to run.
        tasks: of the data set, those of the cell's order among them.
        directory: of the cell alone. Every lesson is committed to it when it is over, by rank 0.
        report: is called on every rank, and of a borrowed lesson on rank 0 alone; the last time right before each
            commit. What it raises ends the cell.
        device: to compute on.
        backbones: of the cell's training, where it is open already, as between cells of the same tasks.
        lenders: directories of other cells. Lessons that the cell shares with them are copied, not taught.
        check: is called on rank 0 right before the directory is changed. It raises, which ends the cell, in a process
            that has lost the right to write.

    Raises:
        ConfigError: unknown method, option or task; or the directory belongs to something else.
        NonFiniteLossError: on every rank, where a loss or a gradient is not finite on any.
    """
    data_digests = digest_prefixes(tasks, choose_tasks(cell, tasks), cell.training.reads_texts)
    lessons = _agreed_lessons(directory, cell, data_digests, device)
    if rank() == 0:  # all ranks have read what is there, or they would not have come this far
        check()
        remove_lessons_after(directory, lessons)
    result = CellResult(cell, lessons)
    if result.is_complete:
        return result
    backbones = backbones or open_backbone(cell.training.backbone, tasks.sequences, device)
    course = _Course(cell, tasks, report, device, backbones)
    if not course.method.is_joint:
        is_first = rank() == 0
        num = borrow_lessons(directory, cell, data_digests, lessons, lenders, report, check) if is_first else 0
        if all_gather(torch.tensor([num], device=device)).any():  # other ranks wait here for the first
            lessons = _agreed_lessons(directory, cell, data_digests, device)
    course.restore(directory, lessons)
    for numbers in course.plan(num_taught(lessons)):
        lesson = course.teach(numbers)
        if rank() == 0:
            check()
            write_lesson(directory, cell, data_digests[numbers[-1]], lesson, numbers[-1], course.method.state_dict())
        lessons += (lesson,)
    return CellResult(cell, lessons)


def _agreed_lessons(directory: Path, cell: Cell, data_digests: tuple[str, ...], device: str) -> tuple[Lesson, ...]:
    """The intact lessons of a cell, once every rank has read them."""
    lessons = continue_cell(directory, cell, data_digests)
    counts = all_gather(torch.tensor([len(lessons)], device=device)).tolist()
    if len(set(counts)) > 1:
        raise RuntimeError(f"ranks see {counts} lessons in {directory}: it must be on storage that all workers share")
    return lessons


class _Course:
    """A method, and what teaches it."""

    def __init__(self, cell: Cell, tasks: TaskSet, report: Report, device: str, backbones: BackboneSource) -> None:
        self.cell, self.tasks, self.sequences = cell, choose_tasks(cell, tasks), tasks.sequences
        self.num_steps = 0
        self._report = report
        self._seed(_Draw.INIT)
        self.method: Method = build_method(cell.method, cell.options, backbones.new)
        self.method.network.precision = getattr(torch, cell.training.precision)
        _check_first_task(self.method, cell, self.tasks[0], backbones)
        if backbones.pretrained is not None:
            self.method.network.backbone.load_state_dict(dict(backbones.pretrained))
        self.method.to(device)

    def plan(self, start: int) -> list[range]:
        """Numbers of the tasks of each lesson from task number `start` on."""
        if self.method.is_joint:
            return [range(len(self.tasks))]
        return [range(number, number + 1) for number in range(start, len(self.tasks))]

    def restore(self, directory: Path, lessons: tuple[Lesson, ...]) -> None:
        """Makes the method what it was after these lessons."""
        if not lessons:
            return
        tasks = [_spec_of(task) for task in self.tasks[: num_taught(lessons)]]
        self.method.make_room(tasks)
        load_model(lesson_directory(directory, len(tasks) - 1) / METHOD_FILE, self.method)
        self.num_steps = lessons[-1].num_steps

    def teach(self, numbers: range) -> Lesson:
        """Teaches tasks, and measures all so far."""
        started = time.perf_counter()
        for number in numbers:
            self._begin(number)
        is_pretrained = self.tasks[numbers[0]].kind == "vector"
        phases = range(0 if is_pretrained else len(self.method.phases))
        curve = [point for phase in phases for point in self._train_phase(numbers, phase)]
        self.method.end_task()
        known = range(numbers[-1] + 1)
        scores = {name: scored.score for name, scored in self._score(known, "test").items()}
        similarity = mask_similarity(self.method)
        lesson = Lesson(
            tasks=self._names(numbers),
            scores=scores,
            metrics={task.name: task.metric for task in self.tasks[: len(known)]},
            curve=tuple(curve),
            similarity=None if similarity is None else tuple(map(tuple, similarity.tolist())),
            num_steps=self.num_steps,
            seconds=time.perf_counter() - started,
        )
        self._tell(numbers, "", 0, self._metrics("test", scores))
        return lesson

    def _begin(self, number: int) -> None:
        self._seed(_Draw.TASK, number)
        self.method.begin_task(_spec_of(self.tasks[number]))

    def _train_phase(self, numbers: range, phase: int) -> list[EpochScore]:
        """Trains until the validation loss has not fallen for some time, and takes back what came after the best."""
        name, settings = self.method.phases[phase], self.cell.training.of_task(numbers[0])
        self._seed(_Draw.PHASE, numbers[-1], phase)
        self.method.begin_phase(name)
        optimizers = open_optimizers(self.method, settings.learning_rate)
        curve = [self._validate(numbers, name, 0, 0.0)]
        best_loss, best_epoch, best_step, best = math.inf, 0, 0, {}
        for epoch in range(1, settings.max_epochs + 1):
            started = time.perf_counter()
            self._train_epoch(optimizers, numbers, phase, epoch)
            seconds = time.perf_counter() - started
            curve.append(self._validate(numbers, name, epoch, seconds))
            if (loss := self._relative_loss(curve[-1].losses)) < best_loss:
                best_loss, best_epoch, best_step = loss, epoch, self.num_steps
                best = {key: value.clone() for key, value in self.method.state_dict().items()}
            elif self._is_enough(epoch - best_epoch, self.num_steps - best_step):
                break
        self.method.load_state_dict(best)
        return curve

    def _validate(self, numbers: range, phase: str, epoch: int, seconds: float) -> EpochScore:
        found = self._score(numbers, "validation")
        scores = {name: scored.score for name, scored in found.items()}
        losses = {name: scored.loss for name, scored in found.items()}
        metrics = self._metrics("val", scores) | {f"val/{name}/loss": loss for name, loss in losses.items()}
        self._tell(numbers, phase, epoch, metrics | ({"time/epoch_s": seconds} if epoch else {}))
        return EpochScore(phase=phase, epoch=epoch, scores=scores, losses=losses, seconds=seconds)

    def _relative_loss(self, losses: dict[str, float]) -> float:
        """Mean over tasks of the loss over that of a guess, by which a joint method's tasks weigh the same."""
        classes = {task.name: task.num_classes for task in self.tasks}
        return sum(loss / math.log(max(2, classes[name])) for name, loss in losses.items()) / len(losses)

    def _is_enough(self, epochs: int, steps: int) -> bool:
        return epochs >= self.cell.training.patience and steps >= self.cell.training.patience_steps

    def _train_epoch(self, optimizers: Optimizers, numbers: range, phase: int, epoch: int) -> None:
        self.method.train()
        batches = self._batches(numbers, phase, epoch)
        for step, (number, samples) in enumerate(batches):
            torch.manual_seed(_mix(self.cell.seed, _Draw.STEP, numbers[-1], phase, epoch, step, rank()))
            progress = Progress(step, len(batches), number if self.method.is_joint else None)
            metrics = take_step(self.method, optimizers, self.tasks[number], self.sequences, samples, progress)
            if not all(map(math.isfinite, metrics.values())):
                name = self.method.phases[phase]
                raise _non_finite(self.cell, self.tasks[number].name, name, epoch, step, self.num_steps, metrics)
            self.num_steps += 1
            self._tell(numbers, self.method.phases[phase], epoch, metrics)

    def _batches(self, numbers: range, phase: int, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Each training sample of each task once: numbers of tasks, and positions of samples (B,)."""
        batches = []
        for number in numbers:
            rng = np.random.default_rng([self.cell.seed, _Draw.ORDER, number, phase, epoch])
            samples = rng.permutation(self.tasks[number].samples("train"))
            size = self.cell.training.of_task(number).batch_size
            batches += [(number, samples[start : start + size]) for start in range(0, len(samples), size)]
        if len(numbers) > 1:  # batches of all tasks, mixed
            rng = np.random.default_rng([self.cell.seed, _Draw.ORDER, len(self.tasks), phase, epoch])
            batches = [batches[place] for place in rng.permutation(len(batches))]
        return batches

    def _score(self, numbers: range, split: str) -> dict[str, Scored]:
        size = self.cell.training.evaluation_batch_size
        return {
            self.tasks[number].name: score_task(self.method, number, self.tasks[number], self.sequences, split, size)
            for number in numbers
        }

    def _metrics(self, kind: str, scores: dict[str, float]) -> dict[str, float]:
        metric_of = {task.name: task.metric for task in self.tasks}
        return {f"{kind}/{name}/{metric_of[name]}": score for name, score in scores.items()}

    def _names(self, numbers: range) -> tuple[str, ...]:
        return tuple(self.tasks[number].name for number in numbers)

    def _tell(self, numbers: range, phase: str, epoch: int, metrics: dict[str, float]) -> None:
        self._report(Point(self.num_steps, self._names(numbers), phase, epoch, metrics))

    def _seed(self, draw: _Draw, *place: int) -> None:
        torch.manual_seed(_mix(self.cell.seed, draw, *place))


def _spec_of(task: Task) -> TaskSpec:
    return TaskSpec(task.name, task.kind, task.num_classes)


def _check_first_task(method: Method, cell: Cell, first: Task, backbones: BackboneSource) -> None:
    if (first.kind == "vector") != (backbones.pretrained is not None):
        raise ConfigError(
            f"the order begins with {first.name}, of kind {first.kind}: a pretrained backbone begins with a task of "
            "kind vector, any other one with a task that it is taught"
        )
    if first.kind == "vector" and not method.takes_pretrained:
        raise ConfigError(f"{cell.method} cannot go on from a pretrained backbone: leave it out of --methods")


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(list(numbers)).generate_state(1, np.uint64)[0])


def _non_finite(
    cell: Cell, task: str, phase: str, epoch: int, step: int, num_steps: int, metrics: dict[str, float]
) -> NonFiniteLossError:
    values = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}  # JSON has no NaN
    place = {"method": cell.label, "task": task, "phase": phase, "epoch": epoch, "step": step}
    message = (
        f"{cell.label}, seed {cell.seed}: the loss of task {task} is not finite in phase {phase}, epoch {epoch}, step "
        f"{step}: {values}. The step was not taken; lower the learning rate of the task"
    )
    return NonFiniteLossError(message, {**place, "seed": cell.seed, "num_steps": num_steps, "metrics": values})
