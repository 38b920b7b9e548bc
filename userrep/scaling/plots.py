"""Figures of scaling laws, from a table of runs and its fits alone.

Legend: `M` cells.
"""

import textwrap
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from userrep.scaling.fit import Estimate
from userrep.scaling.plot_style import ACCENT, ARM_LOOKS, GREY, INK, SECOND, name_loss, name_x
from userrep.scaling.plots_of_designs import downstream_figure, isoflop_figure, rate_figure
from userrep.scaling.records import Law, Laws
from userrep.scaling.runs import ARMS
from userrep.scaling.wording import percent

WIDE, PANEL = 6.6, 3.1  # inches
REFUSAL_WIDTH = 44  # letters of a line


def draw_figures(runs: pa.Table, laws: Laws) -> Iterator[tuple[str, Figure, str]]:
    """Names of files without ending, figures, and what they show, in words. What a design does not have is left out.

    To be drawn and saved under `matplotlib.rc_context(STYLE)`.

    Args:
        runs: of the schema RUNS.
        laws: of the same table.
    """
    if laws.places:
        yield "loss_compute", _compute_figure(runs, laws), "Loss against compute of every cell, with its frontier."
    if laws.center is not None and len(laws.places) > 1:
        yield "factors", _factors_figure(laws), "Loss against each factor, the others held at the center."
    yield from isoflop_figure(laws)
    yield from rate_figure(runs)
    yield from downstream_figure(laws)
    if any(law.refusal is None for law in laws.laws):
        yield "exponents", _exponents_figure(laws), "Exponents with 95% intervals; those not stated are grey."


def _compute_figure(runs: pa.Table, laws: Laws) -> Figure:
    figure = Figure(figsize=(WIDE, 4.3), layout="constrained")
    axes, law = figure.subplots(), laws.law("L(C)")
    for curve in runs["curve"].to_pylist():
        points = [(point["flops"], point["loss"]) for point in curve or () if point["flops"] > 0]
        axes.plot(*zip(*points, strict=True), color=GREY, linewidth=0.6, alpha=0.35, zorder=1) if points else None
    front = [laws.place(cell) for cell in laws.frontier]
    axes.step(
        [one.compute for one in front], [one.loss for one in front], where="post", color=INK, linewidth=1, zorder=2
    )
    handles = [Line2D([], [], color=INK, linewidth=1, label="frontier")]
    _draw_places(axes, laws)
    held = {law.cell_ids[one.cell]: one for one in law.forecasts}
    if law.band:
        handles += _draw_law(axes, law)
    for cell, forecast in held.items():
        place = laws.place(cell)
        axes.vlines(place.compute, forecast.low, forecast.high, color=SECOND, linewidth=1.4, zorder=5)
        axes.plot(place.compute, forecast.predicted, "_", color=SECOND, markersize=9, zorder=6)
        axes.plot(place.compute, place.loss, "o", color=SECOND, fillstyle="none", markersize=11, zorder=6)
    if held:
        look = {"color": SECOND, "marker": "o", "fillstyle": "none", "markersize": 9, "linewidth": 1.4}
        handles.append(Line2D([], [], **look, label="held out, and its forecast without it"))
    factors = {place.factor for place in laws.places}
    handles += [_handle(factor) for factor in ARM_LOOKS if factor in factors]
    handles.append(Line2D([], [], color=GREY, linewidth=0.8, alpha=0.6, label="on the way"))
    name_x(axes, "C")
    axes.set_xlim(laws.places[0].compute / 2, 2 * laws.places[-1].compute)
    shown = [place.loss for place in laws.places] + [end for one in held.values() for end in (one.low, one.high)]
    name_loss(axes, np.array(shown))
    axes.set_title(_title(law), loc="left")
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return figure


def _draw_places(axes: Axes, laws: Laws) -> None:
    for factor, (color, marker, _) in ARM_LOOKS.items():
        found = [place for place in laws.places if place.factor == factor]
        size, front = (11, 7) if factor == "center" else (7 if marker in "PX" else 5, 4)
        axes.plot(
            [place.compute for place in found],
            [place.loss for place in found],
            linestyle="",
            marker=marker,
            color=color,
            markersize=size,
            markeredgecolor="white",
            markeredgewidth=0.5,
            zorder=front,
        )


def _draw_law(axes: Axes, law: Law) -> list[Line2D]:
    x, loss, low, high = np.array([(one.x, one.loss, one.low, one.high) for one in law.band]).T
    axes.fill_between(x, low, high, color=ACCENT, alpha=0.15, linewidth=0, zorder=1)
    axes.plot(x, loss, color=ACCENT, linewidth=1.6, zorder=3)
    return [Line2D([], [], color=ACCENT, linewidth=1.6, label="power law with floor, 95% band")]


def _handle(factor: str) -> Line2D:
    color, marker, name = ARM_LOOKS[factor]
    return Line2D([], [], linestyle="", color=color, marker=marker, markersize=6, label=name)


def _factors_figure(laws: Laws) -> Figure:
    """A panel for each arm, all with one axis of the loss."""
    figure = Figure(figsize=(WIDE, 2 * 2.55), layout="constrained")
    panels = figure.subplots(2, 2, sharey=True).ravel()
    shown = []
    for (factor, arm), axes in zip(ARMS.items(), panels, strict=True):
        law, color, marker = laws.law(f"L({factor})"), *ARM_LOOKS[arm][:2]
        shown += law.losses
        if law.band:
            _draw_law(axes, law)
            floor = law.with_floor.estimate("irreducible_loss")
            assert floor is not None, "of the form with floor"
            axes.axhline(floor.value, color=GREY, linewidth=0.9, linestyle=":")
            shown.append(max(floor.value, 0.85 * min(law.losses)))
        look = {"color": color, "markeredgecolor": "white", "markeredgewidth": 0.5}
        axes.plot(law.values[factor], law.losses, linestyle="", marker=marker, markersize=6, **look)
        center = laws.center_place
        assert center is not None, "drawn for designs with a center"
        axes.plot(center.factors[factor], center.loss, "*", color="black", markersize=10)
        name_x(axes, factor)
        axes.set_title(_title(law), loc="left", fontsize=8)
    for axes in panels:
        name_loss(axes, np.array(shown))
    for axes in panels[1::2]:
        axes.set_ylabel("")
    return figure


def _title(law: Law) -> str:
    """The exponent, or why there is none."""
    if law.refusal is not None:
        return textwrap.fill(f"{law.name}: {law.refusal}", REFUSAL_WIDTH)
    exponent = law.with_floor.estimate(f"exponent_{law.factors[0]}")
    assert exponent is not None, "a fitted power law"
    said = _short(exponent) if exponent.is_stated else "not stated"
    title = f"{law.name}, n = {len(law.cell_ids)}: exponent {said}"
    if law.doubling is not None:
        change = law.doubling.factor_change
        numbers = (percent(change.value), percent(change.high), percent(change.low))
        title += "\nper doubling, loss falls by {} [{}, {}]".format(*numbers)
    return title


def _short(estimate: Estimate) -> str:
    return f"{estimate.value:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _exponents_figure(laws: Laws) -> Figure:
    """Forest: a row for each exponent of the forms with floor; those that are not stated in grey, with the reason."""
    rows = [
        (law.name, estimate)
        for law in laws.laws
        for estimate in law.with_floor.estimates
        if "exponent" in estimate.name
    ]
    figure = Figure(figsize=(WIDE, 0.8 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    # An interval without end would flatten the others: it is cut.
    highest = 1.08 * max(min(estimate.high, 2 * min(estimate.value, 1.0)) for _, estimate in rows)
    for row, (_, estimate) in enumerate(rows):
        color = ACCENT if estimate.is_stated else GREY
        low, high = (float(np.clip(end, 0, highest)) for end in (estimate.low, estimate.high))
        axes.plot([low, high], [row, row], color=color, linewidth=1.8 if estimate.is_stated else 1)
        filled = color if estimate.is_stated else "white"
        axes.plot(min(estimate.value, highest), row, "o", color=color, markersize=6, markerfacecolor=filled)
        text = _short(estimate) if estimate.is_stated else f"not stated: {_reason(estimate)}"
        axes.annotate(
            text,
            (1.02, row),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=7.5,
            color=INK if estimate.is_stated else GREY,
            annotation_clip=False,
        )
    axes.set_yticks(range(len(rows)), [f"{law}: {_readable(estimate.name)}" for law, estimate in rows])
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(0, highest), xlabel="exponent, 95% interval")
    axes.grid(visible=False, axis="y")
    return figure


def _readable(name: str) -> str:
    return f"best {name[-1]} over compute" if name.startswith("compute_exponent") else f"of {name[-1]}"


def _reason(estimate: Estimate) -> str:
    """The first refusal, short enough for the side of a figure."""
    reason = estimate.refusals[0]
    if "times the value wide" in reason:
        return f"width {(estimate.high - estimate.low) / estimate.value:.2g} of the value"
    return textwrap.shorten(reason, 40, placeholder=" ...")
