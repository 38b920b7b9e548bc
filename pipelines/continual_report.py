"""What the cells of an experiment with continual tasks say together: a table, two pages of numbers, and figures.

Cells are grouped by their order of tasks, and in it by method and options; a group's cells differ in the seed.

Legend: `M` tasks of an order, `S` seeds.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.report import FIGURE_STYLE
from userrep.evaluation.transfer import Interval, backward_transfer, forward_transfer, mean_interval
from userrep.schema import TASKS_MATRIX
from userrep.training.cells import CellResult

MATRIX_NAME, TABLE_NAME, FIGURES = "tasks_matrix.parquet", "tasks.md", "figures"
ALONE = "sinmo"  # the method whose scores forward transfer is over
METRIC_NAMES = {"mrr_at_5": "MRR@5", "accuracy": "ACC"}


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
    def is_joint(self) -> bool:
        """Whether all tasks were taught at once."""
        return len(self.results[0].lessons) < len(self.order)


def write_continual_report(results: Sequence[CellResult], directory: Path) -> None:
    """Writes `tasks_matrix.parquet`, `tasks.md` and `figures/*.svg`; files of those names are replaced.

    Args:
        results: of finished cells of one data set.
        directory: is made.

    Raises:
        ValueError: see `group_cells`.
    """
    groups = group_cells(results)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{MATRIX_NAME}.{os.getpid()}.tmp"
    pq.write_table(tasks_matrix(results), temporary)
    os.replace(temporary, directory / MATRIX_NAME)
    (directory / TABLE_NAME).write_text(format_groups(groups), encoding="ascii")
    with matplotlib.rc_context(FIGURE_STYLE):
        for name, figure in _figures(groups):
            figure.savefig(directory / FIGURES / f"{name}.svg", metadata={"Date": None})


def tasks_matrix(results: Sequence[CellResult]) -> pa.Table:
    """All scores of R, one a row, of the schema TASKS_MATRIX; a joint method has but the last row of R."""
    rows = []
    for result in results:
        cell, scores_MM = result.cell, result.scores_MM
        metrics = {name: metric for lesson in result.lessons for name, metric in lesson.metrics.items()}
        for j, i in np.argwhere(np.isfinite(scores_MM)).tolist():
            task = cell.order[i]
            places = {"j": j, "i": i, "trained": cell.order[j], "task": task, "metric": metrics[task]}
            keys = {"method": cell.label, "order": list(cell.order), "seed": cell.seed}
            rows.append(keys | places | {"score": scores_MM[j, i]})
    return pa.Table.from_pylist(rows, TASKS_MATRIX)


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
        name = f"cell {cell.label}, order {_arrows(cell.order)}, seed {cell.seed}"
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


def format_groups(groups: Sequence[Group]) -> str:
    """Markdown: for every order the final scores, method by task, and the transfer between tasks."""
    parts = ["# Continual tasks", "Means over seeds; +- is half of the 95% interval (Student's t)."]
    for order, members in _by_order(groups):
        metrics = members[0].results[0].lessons[-1].metrics
        heads = [f"{name} {METRIC_NAMES[metrics[name]]}" for name in order]
        rows = [
            [group.label, str(group.final.num_seeds), *(_value(group.final, i, "{:.4f}") for i in range(len(order)))]
            for group in members
        ]
        parts += [f"## Order {_arrows(order)}", "Scores on test users after the last task.", _table(heads, rows)]
        rows = [
            [
                f"{group.label} {name}",
                str(interval.num_seeds),
                *(_value(interval, i, "{:+.2f}") for i in range(len(order))),
            ]
            for group in members
            for name, interval in (("FWT", group.forward), ("BWT", group.backward))
            if np.isfinite(interval.mean).any()
        ]
        if rows:
            parts += ["Forward and backward transfer, percent.", _table(list(order), rows)]
    return "\n\n".join(parts) + "\n"


def _by_order(groups: Sequence[Group]) -> Iterator[tuple[tuple[str, ...], list[Group]]]:
    for order, members in groupby(groups, key=lambda group: group.order):
        yield order, list(members)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [["method", "seeds", *heads], ["---", *["---:"] * (len(heads) + 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(interval: Interval, i: int, form: str) -> str:
    mean, reach = interval.mean[i], interval.high[i] - interval.mean[i]
    if not np.isfinite(mean):
        return "-"
    return form.format(mean) + (f" +- {form.replace('+', '').format(reach)}" if np.isfinite(reach) else "")


def _arrows(order: Sequence[str]) -> str:
    return " > ".join(order)


def _figures(groups: Sequence[Group]) -> Iterator[tuple[str, Figure]]:
    """Names of files, and what is in them."""
    for number, (order, members) in enumerate(_by_order(groups), 1):
        for group in members:
            name = f"order{number}-{re.sub(r'[^a-z0-9.]+', '-', group.label.lower()).strip('-')}"
            yield f"scores-{name}", _scores_figure(group)
            if similarities := [s for result in group.results if (s := result.lessons[-1].similarity) is not None]:
                similarity_MM = np.mean(np.array(similarities), axis=0)
                masks = _heat_map(group, similarity_MM, similarity_MM, "cosine of final masks", "{:.2f}")
                yield f"masks-{name}", masks
        if taught_in_order := [group for group in members if not group.is_joint]:
            yield f"forgetting-order{number}", _forgetting_figure(order, taught_in_order)
            yield f"adaptation-order{number}", _adaptation_figure(order, taught_in_order)


def _scores_figure(group: Group) -> Figure:
    """R, each column shaded by its share of the task's best score."""
    mean_MM = group.scores_SMM.mean(axis=0)
    best_M = np.nanmax(mean_MM, axis=0)
    shade_MM = np.divide(mean_MM, best_M, out=np.zeros_like(mean_MM), where=best_M > 0)
    return _heat_map(group, mean_MM, shade_MM, "R: score on a task (column) after training a task (row)", "{:.4f}")


def _heat_map(group: Group, values_MM: np.ndarray, shade_MM: np.ndarray, title: str, form: str) -> Figure:
    size = 1.6 + 0.7 * len(group.order)
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.ma.masked_invalid(shade_MM), cmap="Blues", vmin=0, vmax=1.5)  # dark text stays legible
    for row, column in np.argwhere(np.isfinite(values_MM)).tolist():
        text = form.format(values_MM[row, column])
        axes.text(column, row, text, ha="center", va="center", color="black", fontsize=8)
    axes.set_xticks(range(len(group.order)), group.order)
    axes.set_yticks(range(len(group.order)), group.order)
    axes.grid(visible=False)
    axes.set_title(f"{group.label}\n{title}", fontsize=8)
    return figure


def _forgetting_figure(order: tuple[str, ...], groups: list[Group]) -> Figure:
    """Of every task the score from when it was learned to the end, means with 95% intervals over seeds."""
    figure, panels = _panels(order)
    for i, axes in enumerate(panels):
        for color, group in enumerate(groups):
            scores = mean_interval(group.scores_SMM[:, i:, i])
            reach = np.nan_to_num(scores.high - scores.mean)
            axes.errorbar(range(i, len(order)), scores.mean, reach, fmt="o-", color=f"C{color}", markersize=3)
        axes.set_xticks(range(len(order)), order)
        axes.set_xlabel("trained last")
    return _name_lines(figure, panels, groups)


def _adaptation_figure(order: tuple[str, ...], groups: list[Group]) -> Figure:
    """Of every task the validation score per epoch, phases one after another; a line per seed."""
    figure, panels = _panels(order)
    for i, axes in enumerate(panels):
        for color, group in enumerate(groups):
            for result in group.results:
                scores = [point.scores[order[i]] for point in result.lessons[i].curve]
                axes.plot(scores, color=f"C{color}", linewidth=1, alpha=0.7)
        axes.set_xlabel("epoch")
    return _name_lines(figure, panels, groups)


def _panels(order: tuple[str, ...]) -> tuple[Figure, list[Axes]]:
    columns = min(3, len(order))
    lines = -(-len(order) // columns)
    figure = Figure(figsize=(3.2 * columns, 0.8 + 2.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes in panels[len(order) :]:
        axes.remove()
    for name, axes in zip(order, panels, strict=False):
        axes.set_title(name, fontsize=9)
    return figure, panels[: len(order)]


def _name_lines(figure: Figure, panels: list[Axes], groups: list[Group]) -> Figure:
    panels[0].set_ylabel("score")
    lines = [panels[0].plot([], [], color=f"C{color}")[0] for color in range(len(groups))]
    figure.legend(lines, [group.label for group in groups], loc="outside lower center", ncols=4, fontsize=8)
    return figure
