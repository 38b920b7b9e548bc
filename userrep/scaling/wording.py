"""Numbers of laws in words, the same in a terminal, a report and an answer."""

import math

from userrep.scaling.fit import Estimate

FACTOR_NAMES = {"C": "compute", "N": "model size", "D": "samples", "S": "history length", "B": "batch size"}
SUFFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MAX_PLAIN = 10_000  # whole numbers below are written out: a batch of 2048


def fall(change: Estimate) -> str:
    """A change of log loss as a fall in percent with its interval: `3.7% (95% interval 3.1% to 4.4%)`."""
    low, high = percent(change.high), percent(change.low)
    return f"{percent(change.value)} (95% interval {low} to {high})"


def percent(change: float) -> str:
    """The fall of the loss that a change of its logarithm is; negative where the loss rises."""
    return f"{-100 * math.expm1(min(change, 700.0)):.2g}%"


def amount(value: float) -> str:
    """A size for people: 512, 20k, 4.6M."""
    if abs(value) < MAX_PLAIN and float(value).is_integer():
        return f"{value:.0f}"
    for size, suffix in SUFFIXES:
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def place(factors: dict[str, float]) -> str:
    """`N 1M, D 200k, S 32, B 512`; compute in operations."""
    shown = {name: factors[name] for name in FACTOR_NAMES if name in factors}
    return ", ".join(
        f"{name} {value:.3g}" if name == "C" else f"{name} {amount(value)}" for name, value in shown.items()
    )


def interval(estimate: Estimate, digits: int = 3) -> str:
    """`0.349 (95% interval 0.32 to 0.37)`."""
    return f"{estimate.value:.{digits}g} (95% interval {estimate.low:.{digits}g} to {estimate.high:.{digits}g})"


def correlation(estimate: Estimate) -> str:
    """`0.95 (95% interval 0.87 to 0.98)`."""
    return f"{estimate.value:.2f} (95% interval {estimate.low:.2f} to {estimate.high:.2f})"


def cost(flops: float, hours: float | None) -> str:
    """A price: operations, and hours where the speed is known."""
    return f"{flops:.2g} FLOPs" + ("" if hours is None else f", {duration(hours)}")


def duration(hours: float) -> str:
    """Hours, minutes or seconds, two digits."""
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.2g} min" if hours >= 1 / 60 else f"{3600 * hours:.2g} s"
