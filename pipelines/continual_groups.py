"""Cells of an experiment with continual tasks side by side, and what follows from their scores.

Cells are grouped by their order of tasks, and in it by method and options; a group's cells differ in the seed.

Legend: `M` tasks of an order, `S` seeds.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from userrep.data.tasks import Metric
from userrep.evaluation.transfer import Interval, backward_transfer, forward_transfer, mean_interval
from userrep.training.cells import CellResult

ALONE = "sinmo"  # the method whose scores forward transfer is over
METRIC_NAMES = {"mrr_at_5": "MRR@5", "accuracy": "ACC", "recall_at_10": "R@10"}  # for people


@dataclass(frozen=True, eq=False)
class Group:
    """Cells that differ in the seed alone.

    Attributes:
        label: method and options.
        order: names of tasks.
        results: by ascending seed.
        final: scores after the last task, (M,); so are the others.
        backward: transfer in percent; NaN of a joint method, and for the last task.
        forward: transfer in percent, of the seeds with which `sinmo` was run too; NaN where it was not, of `sinmo`
            itself and of a joint method, and for the first task.
    """

    label: str
    order: tuple[str, ...]
    results: tuple[CellResult, ...]
    final: Interval
    backward: Interval
    forward: Interval

    @property
    def scores_SMM(self) -> np.ndarray:
        """R of each seed."""
        return np.stack([result.scores_MM for result in self.results])

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of the results."""
        return tuple(result.cell.seed for result in self.results)

    @property
    def slug(self) -> str:
        """The label as part of the name of a file or of a metric."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")

    @property
    def metrics(self) -> dict[str, Metric]:
        """What each task is measured by."""
        return self.results[0].lessons[-1].metrics

    @property
    def is_joint(self) -> bool:
        """Whether all tasks were taught at once."""
        return len(self.results[0].lessons) < len(self.order)


def group_cells(results: Sequence[CellResult]) -> list[Group]:
    """Groups by order and label, in the order in which they first appear.

    Raises:
        ValueError: no cell, a cell that is not finished, or two that differ in neither label, order nor seed.
    """
    if not results:
        raise ValueError("there is no cell to report: run one first")
    known: dict[tuple[tuple[str, ...], str], dict[int, CellResult]] = {}
    for result in results:
        cell = result.cell
        name = f"cell {cell.label}, order {arrows(cell.order)}, seed {cell.seed}"
        if not result.is_complete:
            raise ValueError(f"{name} has {len(result.lessons)} of its lessons: finish it, or leave it out")
        seeds = known.setdefault((cell.order, cell.label), {})
        if cell.seed in seeds:
            raise ValueError(f"{name} is there twice: cells that differ in their training need reports of their own")
        seeds[cell.seed] = result
    orders = list(dict.fromkeys(order for order, _ in known))
    alone = [result for result in results if result.cell.method == ALONE]
    groups = []
    for (order, label), by_seed in sorted(known.items(), key=lambda item: orders.index(item[0][0])):
        ordered = tuple(by_seed[seed] for seed in sorted(by_seed))
        groups.append(_group(label, order, ordered, alone))
    return groups


def _group(label: str, order: tuple[str, ...], results: tuple[CellResult, ...], alone: list[CellResult]) -> Group:
    unknown_M = np.full(len(order), np.nan)
    final = mean_interval(np.stack([result.scores_MM[-1] for result in results]))
    backward, forward = [unknown_M], []
    if len(results[0].lessons) == len(order):  # not joint
        backward = [backward_transfer(result.scores_MM) for result in results]
        if results[0].cell.method != ALONE:
            single = [(result.scores_MM, single_scores(alone, order, result.cell.seed)) for result in results]
            forward = [forward_transfer(R, single_M) for R, single_M in single if np.isfinite(single_M).any()]
    transfers = (mean_interval(np.stack(values)) for values in (backward, forward or [unknown_M]))
    return Group(label, order, results, final, *transfers)


def single_scores(alone: Sequence[CellResult], order: tuple[str, ...], seed: int) -> np.ndarray:
    """What each task scores when it is learned alone with this seed, (M,); NaN where that is not known.

    A task that was run alone in this order is taken from there, others from any other order.

    Args:
        alone: cells of `sinmo`.
        order: names of tasks.
        seed: of the cells that count.
    """
    scores: dict[str, float] = {}
    for result in sorted(alone, key=lambda result: result.cell.order == order):  # the last one counts
        if result.cell.seed == seed:
            scores |= result.lessons[-1].scores
    return np.array([scores.get(name, np.nan) for name in order])


def by_order(groups: Sequence[Group]) -> Iterator[tuple[tuple[str, ...], list[Group]]]:
    """Each order of tasks, with its groups."""
    for order, members in groupby(groups, key=lambda group: group.order):
        yield order, list(members)


def arrows(order: Sequence[str]) -> str:
    """An order of tasks, for people."""
    return " > ".join(order)
