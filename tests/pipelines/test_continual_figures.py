"""Figures of continual cells: what is drawn, in which look, and that it is all on the page."""

from collections.abc import Sequence
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pipelines.continual_figures import adaptation_curve, draw_figures
from pipelines.continual_groups import group_cells
from pipelines.report import FIGURE_STYLE
from tests.support.cell_results import ORDER, result_of, results
from userrep.continual.catalog import METHODS
from userrep.training.cells import CellResult, EpochScore

ROWS = [[0.1], [0.1, 0.2], [0.1, 0.2, 0.5]]
LONG = {"retention_weight": 0.35, "sampling": "minimum", "teacher_scale": "fixed"}
Curve = Sequence[tuple[str, float]]  # phase and score of each point


def draw(cells: list[CellResult]) -> dict[str, Figure]:
    with matplotlib.rc_context(FIGURE_STYLE):
        return dict(draw_figures(group_cells(cells)))


def every_method() -> list[CellResult]:
    """The catalog, many variants of one method, and another order."""
    variants = [result_of("teracon", ROWS, retention_weight=weight) for weight in range(12)]
    reversed_ = [result_of(name, ROWS, order=ORDER[::-1]) for name in ("teracon", "hat")]
    return [*(result_of(name, ROWS) for name in METHODS), *variants, result_of("teracon", ROWS, **LONG), *reversed_]


def look(line: Line2D) -> tuple[object, ...]:
    return line.get_color(), line.get_marker(), line.get_linestyle()


def names(figure: Figure) -> dict[str, tuple[object, ...]]:
    """What the legend says."""
    [legend] = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    handles = legend.legend_handles
    return dict(zip(labels, map(look, (h for h in handles if isinstance(h, Line2D))), strict=True))


def with_curve(result: CellResult, place: int, curve: Curve) -> CellResult:
    """A cell whose task at `place` was learned so."""
    task = result.cell.order[place]
    points = tuple(
        EpochScore(phase=phase, epoch=0, scores={task: score}, losses={}, seconds=0) for phase, score in curve
    )
    lessons = list(result.lessons)
    lessons[place] = lessons[place].model_copy(update={"curve": points})
    return replace(result, lessons=tuple(lessons))


def test_a_method_looks_the_same_in_every_figure_and_like_no_other() -> None:
    figures = draw(every_method())
    of_figure = {name: names(f) for name, f in figures.items() if name.startswith(("forgetting", "adaptation"))}
    assert sorted(of_figure) == ["adaptation-order1", "adaptation-order2", "forgetting-order1", "forgetting-order2"]
    looks = of_figure["forgetting-order1"]
    assert len(looks) == len(METHODS) + 13 == len(set(looks.values()))
    assert len({looks[name][0] for name in METHODS}) == len(METHODS)  # by the colour alone
    for found in of_figure.values():
        assert found == {label: looks[label] for label in found}
    for name in of_figure:
        for axes in figures[name].axes:
            assert [look(line) for line in axes.lines] == list(of_figure[name].values())
    # Nor does it matter which other methods there are.
    [alone] = names(draw([result_of("conure", ROWS)])["forgetting-order1"]).values()
    assert alone == looks["conure"]


def test_forgetting_is_the_mean_since_a_task_was_learned() -> None:
    cells = results()[2:4]  # one method, two seeds
    figure = draw(cells)["forgetting-order1"]
    assert [axes.get_title() for axes in figure.axes] == list(ORDER)
    assert [axes.get_ylabel() for axes in figure.axes] == ["MRR@5", "MRR@5", "ACC"]
    for i, axes in enumerate(figure.axes):
        [line] = axes.lines
        expected = [sum(cell.lessons[j].scores[ORDER[i]] for cell in cells) / 2 for j in range(i, 3)]
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx(expected)
        assert [label.get_text() for label in axes.get_xticklabels()] == list(ORDER[i:])
        low, high = axes.get_ylim()
        assert low < min(expected)
        assert max(expected) < high


def test_methods_stand_beside_each_other() -> None:
    """No two at one place, and each nearest to the task that was trained last."""
    figure = draw(every_method())["forgetting-order1"]
    for i, axes in enumerate(figure.axes):
        places = np.stack([np.asarray(line.get_xdata()) for line in axes.lines])
        assert len(np.unique(places.round(9))) == places.size
        assert (np.rint(places) == np.arange(i, 3)).all()


def test_adaptation_is_the_mean_of_seeds_in_the_same_phase() -> None:
    curves: list[Curve] = [
        [("train", 0.1), ("train", 0.2), ("train", 0.5), ("retrain", 0.3), ("retrain", 0.6)],
        [("train", 0.3), ("train", 0.4), ("retrain", 0.1), ("retrain", 0.2), ("retrain", 0.4)],
    ]
    cells = [with_curve(result_of("conure", ROWS, seed=s), 1, curve) for s, curve in enumerate(curves)]
    [group] = group_cells(cells)
    epochs, scores = adaptation_curve(group, 1)
    # The second seed waits for the first one before it is pruned, the first one for the second one at the end.
    assert epochs.tolist() == [0, 1, 2, 2, 3, 4]
    assert scores.tolist() == pytest.approx([0.2, 0.3, (0.5 + 0.4) / 2, 0.2, 0.4, (0.6 + 0.4) / 2])
    axes = draw(cells)["adaptation-order1"].axes[1]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == scores.tolist()
    epochs, scores = adaptation_curve(group, 0)
    assert epochs.tolist() == [0, 1, 2]
    assert scores.tolist() == pytest.approx([0, 0.1, 0.2])


def test_a_task_that_is_not_taught_has_no_adaptation_but_can_be_forgotten() -> None:
    order = ("universal", "T2")
    cells = [result_of("hat", [[0.5], [0.4, 0.2]], seed, order) for seed in range(2)]
    [group] = group_cells(cells)
    assert [values.shape for values in adaptation_curve(group, 0)] == [(0,), (0,)]
    assert adaptation_curve(group, 1)[0].tolist() == [0, 1, 2]
    figures = draw(cells)
    assert np.asarray(figures["adaptation-order1"].axes[0].lines[0].get_ydata()).size == 0
    assert np.asarray(figures["forgetting-order1"].axes[0].lines[0].get_ydata()).tolist() == [0.5, 0.4]


@pytest.mark.parametrize("order", [ORDER, ORDER[:2]], ids=len)
def test_nothing_is_cut_off(order: tuple[str, ...]) -> None:
    rows = ROWS[: len(order)]
    cells = [result_of(name, rows, order=order) for name in METHODS] + [result_of("teracon", rows, order=order, **LONG)]
    for name, figure in draw(cells).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        texts = [axes.title for axes in figure.axes] + [
            text for legend in figure.legends for text in legend.get_texts()
        ]
        for text in texts:
            box = text.get_window_extent()
            assert box.x0 >= 0, (name, text)
            assert box.y0 >= 0, (name, text)
            assert box.x1 <= figure.bbox.x1, (name, text)
            assert box.y1 <= figure.bbox.y1, (name, text)
