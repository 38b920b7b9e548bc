"""Figures of laws: which are drawn, with what in them, and that nothing of a title runs into its neighbour."""

import matplotlib
import pyarrow as pa
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.support.runs_table import isoflop_runs, rate_runs, star_laws, star_runs, take
from userrep.scaling.laws import fit_laws
from userrep.scaling.plot_style import STYLE
from userrep.scaling.plots import draw_figures
from userrep.scaling.records import Laws


def draw(runs: pa.Table, laws: Laws | None = None) -> dict[str, Figure]:
    with matplotlib.rc_context(STYLE):
        return {name: figure for name, figure, _ in draw_figures(runs, laws or fit_laws(runs, num_resamples=50))}


def texts(figure: Figure) -> str:
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    found += [axes.get_title(loc="left") for axes in figure.axes]
    return "\n".join([*found, *(label.get_text() for axes in figure.axes for label in axes.get_yticklabels())])


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (isoflop_runs(), {"loss_compute", "isoflop", "downstream", "exponents"}),
        (rate_runs(), {"loss_compute", "learning_rates", "downstream"}),
        (take(star_runs(), 1), {"loss_compute"}),
        (take(star_runs(), 0), set()),
    ],
    ids=["isoflop", "rates", "one", "none"],
)
def test_figures_are_those_of_the_design(runs: pa.Table, names: set[str]) -> None:
    assert draw(runs).keys() == names


def test_figures_of_a_star_say_what_the_laws_say() -> None:
    figures = draw(star_runs(), star_laws())
    assert figures.keys() == {"loss_compute", "factors", "downstream", "exponents"}
    exponents = texts(figures["exponents"])
    for law in star_laws().laws:
        for estimate in law.with_floor.estimates:
            if "exponent" in estimate.name:
                said = f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"
                assert (said in exponents) == estimate.is_stated
    assert "not stated: width" in exponents
    assert len(figures["factors"].axes) == 4
    points = [line for line in figures["loss_compute"].axes[0].lines if line.get_color() == "#8a8a8a"]
    assert len(points) == 27  # a curve of each finished cell


def test_titles_of_panels_keep_apart() -> None:
    for figure in draw(take(star_runs(), 6)).values():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        boxes = [axes._left_title.get_window_extent() for axes in figure.axes if axes.get_title(loc="left")]
        for i, box in enumerate(boxes):
            assert box.x1 <= figure.bbox.x1
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_the_best_learning_rate_of_a_batch_is_marked() -> None:
    figure = draw(rate_runs())["learning_rates"]
    assert texts(figure).count("best") == 8  # two models, four batches
