"""What is told of a cell: of every step and epoch while it is taught, and of every lesson."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from userrep.training.cells import Lesson


@dataclass(frozen=True)
class Point:
    """News of a cell: of every step, of every epoch, and of every task that was taught.

    Attributes:
        step: optimizer steps of the cell so far.
        tasks: names of the lesson's tasks, usually one.
        phase: of the lesson; empty once it is over.
        epoch: of the phase, from 1; 0: before its first step.
        metrics: of a step `train/...`, over all ranks; of an epoch `val/<task>/<metric>` and `time/epoch_s`; of a
            lesson `test/<task>/<metric>` of all tasks so far.
    """

    step: int
    tasks: tuple[str, ...]
    phase: str
    epoch: int
    metrics: dict[str, float]


Report = Callable[[Point], None]


def lesson_points(lesson: Lesson, start_step: int) -> Iterator[Point]:
    """What was told of a lesson while it was taught, but for its steps, of which it keeps nothing.

    Args:
        lesson: of one task.
        start_step: optimizer steps of the cell before it.
    """
    num_epochs = sum(score.epoch > 0 for score in lesson.curve)
    # All its epochs are equally long; a pretrained task has none.
    epoch_steps, step = (lesson.num_steps - start_step) // max(1, num_epochs), start_step
    for score in lesson.curve:
        step += epoch_steps if score.epoch else 0
        metrics = {f"val/{name}/{lesson.metrics[name]}": value for name, value in score.scores.items()}
        metrics |= {f"val/{name}/loss": loss for name, loss in score.losses.items()}
        metrics |= {"time/epoch_s": score.seconds} if score.epoch else {}
        yield Point(step, lesson.tasks, score.phase, score.epoch, metrics)
    metrics = {f"test/{name}/{lesson.metrics[name]}": value for name, value in lesson.scores.items()}
    yield Point(lesson.num_steps, lesson.tasks, "", 0, metrics)
