"""How figures of scaling laws look: colours that colour-blind readers tell apart, a marker for each arm, units.

Source of the colours: Okabe and Ito, Color Universal Design (2008).
"""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator, ScalarFormatter

from userrep.scaling.wording import amount

INK, GREY, ACCENT, SECOND = "#333333", "#8a8a8a", "#0072B2", "#D55E00"
# Arm -> colour, marker, name.
ARM_LOOKS = {
    "center": ("#000000", "*", "center"),
    "model": ("#0072B2", "o", "model"),
    "samples": ("#E69F00", "s", "samples"),
    "history": ("#009E73", "^", "history"),
    "batch": ("#CC79A7", "D", "batch"),
    "grid": ("#56B4E9", "P", "grid"),
    "budget": ("#56B4E9", "X", "budget"),
}
AXIS_LABELS = {
    "C": "compute C of a run (FLOPs)",
    "N": "parameters N, without embeddings",
    "D": "samples seen D",
    "S": "history S (most events of a view)",
    "B": "global batch B (users)",
}
LOSS_LABEL = "loss (nats)"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scaling",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "grid.color": "#bbbbbb",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def name_x(axes: Axes, factor: str) -> None:
    """A logarithmic axis of a factor: powers of ten for compute, 20k and 4.6M for others."""
    axes.set_xscale("log")
    axes.set_xlabel(AXIS_LABELS[factor])
    if factor != "C":
        base = 2 if factor in "SB" else 10
        axes.xaxis.set_major_locator(LogLocator(base=base, subs=(1.0,) if base == 2 else (1.0, 3.0), numticks=9))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: amount(round(value, 6))))
        axes.xaxis.set_minor_locator(NullLocator())


def name_loss(axes: Axes, losses: np.ndarray, label: str = LOSS_LABEL) -> None:
    """A logarithmic axis of the loss with plain numbers as ticks, and a little room around the losses."""
    low, high = float(losses.min()), float(losses.max())
    room = max(0.03, 0.08 * np.log(high / low))
    axes.set_yscale("log")
    axes.set_ylim(low * np.exp(-room), high * np.exp(room))
    axes.set_ylabel(label)
    bottom, top = axes.get_ylim()
    steps = np.array([0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10])
    step = float(steps[min(len(steps) - 1, int(np.searchsorted(steps, (top - bottom) / 7)))])
    ticks = np.arange(np.ceil(bottom / step) * step, top, step)
    axes.set_yticks(ticks)
    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    formatter.set_useOffset(False)
    axes.yaxis.set_major_formatter(formatter)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
