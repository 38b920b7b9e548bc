"""Figures of an experiment with continual tasks: scores, forgetting and adaptation of its methods, and their masks.

Legend: `M` tasks of an order.
"""

import re
from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipelines.continual_groups import Group, by_order
from userrep.evaluation.transfer import mean_interval


def draw_figures(groups: Sequence[Group]) -> Iterator[tuple[str, Figure]]:
    """Names of files without their ending, and what is in them.

    Args:
        groups: as `group_cells` sorts them.
    """
    for number, (order, members) in enumerate(by_order(groups), 1):
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
