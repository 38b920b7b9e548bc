"""Figures that need a design of their own: IsoFLOP curves, learning rates by batch, downstream against the loss."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from userrep.scaling.plot_style import ARM_LOOKS, INK, LOSS_LABEL, SECOND, name_loss, name_x
from userrep.scaling.records import Laws
from userrep.scaling.runs import Place
from userrep.scaling.wording import amount

WIDE = 6.6  # inches
BUDGET_RATIO = 1.1  # between budgets that are told apart: a whole number of steps meets a budget within 2%
MIN_OF_BUDGET = 3  # sizes that shape a parabola
MAX_PANELS = 4

Drawn = Iterator[tuple[str, Figure, str]]


def isoflop_figure(laws: Laws) -> Drawn:
    """Loss against model size for every budget, with the parabola's lowest point."""
    groups = [group for group in _budgets(laws.places) if len(group) >= MIN_OF_BUDGET]
    if not groups:
        return
    figure = Figure(figsize=(WIDE, 3.9), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(groups)))
    for color, group in zip(colors, groups, strict=True):
        n_M, loss_M = np.array([(place.factors["N"], place.loss) for place in group]).T
        label = f"{np.mean([place.compute for place in group]):.2g} FLOPs"
        axes.plot(n_M, loss_M, linestyle="", marker="o", color=color, markersize=5, label=label)
        curve = np.polyfit(np.log(n_M), np.log(loss_M), 2)
        x = np.geomspace(n_M.min(), n_M.max(), 60)
        axes.plot(x, np.exp(np.polyval(curve, np.log(x))), color=color, linewidth=1.2)
        best = -curve[1] / (2 * curve[0]) if curve[0] > 0 else math.inf
        if np.log(n_M.min()) < best < np.log(n_M.max()):
            lowest = float(np.exp(np.polyval(curve, best)))
            axes.plot(math.exp(best), lowest, "*", color=SECOND, markersize=11, zorder=5)
    axes.plot([], [], "*", color=SECOND, markersize=9, linestyle="", label="lowest of a parabola")
    name_x(axes, "N")
    name_loss(axes, np.array([place.loss for group in groups for place in group]))
    figure.legend(loc="outside right upper", title="budget")
    yield "isoflop", figure, "Loss against model size at equal compute; stars are the lowest points of parabolas."


def _budgets(places: Sequence[Place]) -> list[list[Place]]:
    groups = list[list[Place]]()
    for place in (place for place in places if place.factor == "budget"):  # the cheapest first
        if groups and place.compute < BUDGET_RATIO * groups[-1][0].compute:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def rate_figure(runs: pa.Table) -> Drawn:
    """A map of batch and learning rate for every model that was run at several rates."""
    maps = _rate_maps(runs)
    if not maps:
        return
    figure = Figure(figsize=(WIDE, 3.3), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharey=True)[0]
    image = None
    highest = max(max(cells.values()) / min(cells.values()) - 1 for _, cells in maps)
    # Panels share their axes, so they have the rows of all models; a batch that a model was not run at stays blank.
    batches, rates = (sorted({key[i] for _, cells in maps for key in cells}) for i in (0, 1))
    for axes, (title, cells) in zip(panels, maps, strict=True):
        excess = np.full((len(batches), len(rates)), np.nan)
        for (batch, rate), loss in cells.items():
            row = [value for (other, _), value in cells.items() if other == batch]
            excess[batches.index(batch), rates.index(rate)] = 100 * (loss / min(row) - 1)
        image = axes.imshow(excess, origin="lower", aspect="auto", cmap="cividis_r", vmin=0, vmax=100 * highest)
        for i, j in np.argwhere(np.isfinite(excess)).tolist():
            dark = excess[i, j] > 55 * highest
            is_best = excess[i, j] == 0
            axes.text(
                j,
                i,
                "best" if is_best else f"+{excess[i, j]:.1f}",
                ha="center",
                va="center",
                fontsize=8,
                fontweight="bold" if is_best else "normal",
                color="white" if dark else "black",
            )
        axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        axes.set_yticks(range(len(batches)), [amount(batch) for batch in batches])
        axes.grid(visible=False)
        axes.set_title(title, loc="left")
    figure.supxlabel("learning rate, times the ladder's", fontsize=9)
    panels[0].set_ylabel("global batch B (users)")
    assert image is not None, "there is a panel"
    figure.colorbar(image, ax=panels.tolist(), label="loss above the best of its batch (%)", shrink=0.9)
    yield "learning_rates", figure, "Loss above the best of its batch, for every batch and learning rate."


def _rate_maps(runs: pa.Table) -> list[tuple[str, dict[tuple[int, float], float]]]:
    """By model: (batch, rate factor) -> mean loss; models with the most cells, of a single history and samples."""
    losses = defaultdict[tuple, dict[tuple[int, float], list[float]]](lambda: defaultdict(list))
    for row in runs.to_pylist():
        if row["status"] == "finished" and row["loss"] is not None and math.isfinite(row["loss"]):
            samples = float(f"{row['samples']:.1g}")  # a batch has a whole number of steps
            key = (row["parameters"], row["dim"], row["max_events"], samples)
            losses[key][row["batch_size"], row["learning_rate_factor"]].append(row["loss"])
    maps = []
    for key, cells in losses.items():
        by_batch = defaultdict[int, int](int)
        for batch, _ in cells:
            by_batch[batch] += 1
        tried = {batch for batch, num in by_batch.items() if num > 1}
        if tried:
            means = {place: float(np.mean(values)) for place, values in cells.items() if place[0] in tried}
            maps.append((f"N {amount(key[0])}, D {amount(key[3])}, S {key[2]}", means, key[0]))
    largest = sorted(maps, key=lambda one: -len(one[1]))[:MAX_PANELS]
    return [(title, means) for title, means, _ in sorted(largest, key=lambda one: one[2])]


def downstream_figure(laws: Laws) -> Drawn:
    """A panel for each task: loss of its probe against the pretraining loss."""
    tasks = sorted({task for place in laws.places for task in place.downstream_losses})
    if not tasks or len(laws.places) < MIN_OF_BUDGET:
        return
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(WIDE if columns > 1 else WIDE / 2, 2.9 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    values = {found.measure: found.value for found in laws.correlations}
    for axes in panels[len(tasks) :]:
        axes.remove()
    for task, axes in zip(tasks, panels, strict=False):
        for factor, (color, marker, _) in ARM_LOOKS.items():
            found = [p for p in laws.places if p.factor == factor and task in p.downstream_losses]
            axes.plot(
                [place.loss for place in found],
                [place.downstream_losses[task] for place in found],
                linestyle="",
                marker=marker,
                color=color,
                markersize=9 if factor == "center" else 5,
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=ARM_LOOKS[factor][2] if found else None,
            )
        value = values[f"downstream_losses/{task}"]
        said = f"{value.value:.2f} [{value.low:.2f}, {value.high:.2f}]" if value.is_stated else "not stated"
        axes.set_title(f"{task}: rank correlation {said}", loc="left", fontsize=8, color=INK)
        axes.set(xlabel=f"pretraining {LOSS_LABEL}", ylabel="downstream loss (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    yield "downstream", figure, "Downstream loss of a probe against the pretraining loss, a panel for each task."
