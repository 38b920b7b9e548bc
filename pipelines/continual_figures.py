"""Figures of an experiment with continual tasks: scores, forgetting and adaptation of its methods, and their masks.

A method has one look in all figures, and one without options in all reports.

Legend: `M` tasks of an order, `E` epochs.
"""

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from pipelines.continual_groups import METRIC_NAMES, Group, by_order
from userrep.continual.catalog import METHODS
from userrep.evaluation.transfer import mean_interval

# Looks in turn, first of the methods of the catalog. Of thirty, those of one colour differ in marker and line.
COLORS = tuple(
    f"tab:{name}" for name in ("gray", "orange", "olive", "brown", "purple", "green", "red", "blue", "cyan", "pink")
)
MARKERS = "sovX<DP^>"
LINES = ("-", "--", ":")

SMALL = 8  # points
LETTER_WIDTH = 0.6 * SMALL / 72  # inches; 0.6 of its size is what a letter of the font takes on average
PANEL_COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 3, 3.2, 2.4  # inches
NAME_MARGIN, NAME_HEIGHT = 0.7, 0.18  # inches: of a method's name in the legend, what is beside it, and a line
DODGE = 0.6  # over how much of the way from one task to the next the methods are spread out
MARKS = 8  # of a line of many epochs

Looks = dict[str, dict[str, Any]]  # by label, what `Axes.plot` takes


def draw_figures(groups: Sequence[Group]) -> Iterator[tuple[str, Figure]]:
    """Names of files without their ending, and what is in them.

    Args:
        groups: as `group_cells` sorts them.
    """
    looks = _looks(groups)
    for number, (order, members) in enumerate(by_order(groups), 1):
        for group in members:
            name = f"order{number}-{group.slug}"
            yield f"scores-{name}", _scores_figure(group)
            if similarities := [s for result in group.results if (s := result.lessons[-1].similarity) is not None]:
                similarity_MM = np.mean(np.array(similarities), axis=0)
                masks = _heat_map(group, similarity_MM, similarity_MM, "cosine of final masks", "{:.2f}")
                yield f"masks-{name}", masks
        if taught_in_order := [group for group in members if not group.is_joint]:
            yield f"forgetting-order{number}", _forgetting_figure(order, taught_in_order, looks)
            yield f"adaptation-order{number}", _adaptation_figure(order, taught_in_order, looks)


def _looks(groups: Sequence[Group]) -> Looks:
    labels = dict.fromkeys([*METHODS, *(group.label for group in groups)])
    return {
        label: {
            "color": COLORS[number % len(COLORS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": LINES[number // len(COLORS) % len(LINES)],
            "linewidth": 1.3,
            "markersize": 3.5,
        }
        for number, label in enumerate(labels)
    }


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
        axes.text(column, row, text, ha="center", va="center", color="black", fontsize=SMALL)
    axes.set_xticks(range(len(group.order)), group.order)
    axes.set_yticks(range(len(group.order)), group.order)
    axes.grid(visible=False)
    lines = [line for text in (group.label, title) for line in textwrap.wrap(text, int(size / LETTER_WIDTH))]
    axes.set_title("\n".join(lines), fontsize=SMALL)
    return figure


def _forgetting_figure(order: tuple[str, ...], groups: list[Group], looks: Looks) -> Figure:
    """Of every task the score from when it was learned to the end, means with 95% intervals over seeds."""
    figure, panels = _panels(groups, looks)
    shifts = DODGE * ((np.arange(len(groups)) + 0.5) / len(groups) - 0.5)
    for i, axes in enumerate(panels):
        lines = [
            (np.arange(i, len(order)) + shift, mean_interval(group.scores_SMM[:, i:, i]), looks[group.label])
            for shift, group in zip(shifts, groups, strict=True)
        ]
        for places, scores, look in lines:
            axes.plot(places, scores.mean, **look)
        axes.set_ylim(axes.get_ylim())  # the means fill the panel: the interval of two seeds may be ten times as long
        for places, scores, look in lines:
            axes.vlines(places, scores.low, scores.high, color=look["color"], linewidth=0.8, alpha=0.6)
        axes.set_xlim(i - 0.5, len(order) - 0.5)
        axes.set_xticks(range(i, len(order)), order[i:])
        axes.set_xlabel("trained last")
    return figure


def _adaptation_figure(order: tuple[str, ...], groups: list[Group], looks: Looks) -> Figure:
    """Of every task the validation score while it is trained, mean over seeds."""
    figure, panels = _panels(groups, looks)
    for i, axes in enumerate(panels):
        for group in groups:
            epochs, scores = adaptation_curve(group, i)
            axes.plot(epochs, scores, **looks[group.label], markevery=max(1, len(epochs) // MARKS))
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch")
    return figure


def adaptation_curve(group: Group, i: int) -> tuple[np.ndarray, np.ndarray]:
    """How a task is learned: epochs, and the validation score after each as the mean over seeds; both (E,).

    A task that is not taught, of a pretrained encoder, has no epochs.

    A seed that has ended a phase stays at its last score until the others have too, so that the mean is always over
    the same seeds, in the same phase. A phase begins at the epoch at which the one before ended: the step there is what
    lies between the two, such as pruning.

    Args:
        group: not joint.
        i: place of the task in the order.
    """
    task, curves = group.order[i], [result.lessons[i].curve for result in group.results]
    epochs, means = [np.empty(0, dtype=int)], [np.empty(0)]
    for phase in dict.fromkeys(point.phase for point in curves[0]):
        scores = [[point.scores[task] for point in curve if point.phase == phase] for curve in curves]
        length = max(map(len, scores))
        epochs.append(np.arange(length) + (epochs[-1][-1] if epochs[-1].size else 0))
        means.append(np.mean([row + row[-1:] * (length - len(row)) for row in scores], axis=0))
    return np.concatenate(epochs), np.concatenate(means)


def _panels(groups: list[Group], looks: Looks) -> tuple[Figure, list[Axes]]:
    """A panel for each task, and below them the methods' names."""
    order, labels = groups[0].order, [group.label for group in groups]
    columns = min(PANEL_COLUMNS, len(order))
    lines, width = _ceil_div(len(order), columns), PANEL_WIDTH * columns
    names = max(1, int(width / (NAME_MARGIN + LETTER_WIDTH * max(map(len, labels)))))  # in a line
    height = PANEL_HEIGHT * lines + NAME_HEIGHT * (1 + _ceil_div(len(labels), names))
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel().tolist()
    for axes in panels[len(order) :]:
        axes.remove()
    for name, axes in zip(order, panels, strict=False):
        axes.set_title(name, fontsize=9)
        axes.set_ylabel(METRIC_NAMES[groups[0].metrics[name]])
    drawn = [Line2D([], [], **looks[label]) for label in labels]
    figure.legend(drawn, labels, loc="outside lower center", ncols=names, fontsize=SMALL)
    return figure, panels[: len(order)]


def _ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)
