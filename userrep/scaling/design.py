"""Which cell to run next: the one after which an exponent, or a forecast, is known best."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from userrep.scaling.cells import log_factors
from userrep.scaling.fit import Fit


@dataclass(frozen=True)
class NextCell:
    """What one more cell would do, to first order.

    Attributes:
        candidate: its position among the candidates.
        factors: its place.
        target: quantity that is to be known better.
        variance_cut: share of the target's variance that goes, 0..1.
        cut_per_cost: the same over the cost of the cell; without costs, the same.
    """

    candidate: int
    factors: dict[str, float]
    target: str
    variance_cut: float
    cut_per_cost: float

    @property
    def width_cut(self) -> float:
        """Share of the width of the target's interval that goes, 0..1."""
        return 1 - math.sqrt(max(0.0, 1 - self.variance_cut))


def next_cells(
    fit: Fit,
    candidates: Mapping[str, np.ndarray],
    *,
    target: str | Mapping[str, float] | None = None,
    cost_M: np.ndarray | None = None,
) -> list[NextCell]:
    """Ranks candidates by the variance of the target that they would remove, per cost where costs are given.

    With the covariance S of the parameters and the gradients g of the target and j of a candidate's log loss, a cell
    removes (g' S j)**2 / (1 + j' S j) of the variance g' S g. Nothing is fitted, so thousands of candidates are cheap.

    Source: sequential design for the c-criterion (Atkinson, Donev and Tobias, Optimum Experimental Designs, 2007),
    linearised at the fit. Differs: covariance of least squares; under a Huber loss it is larger by one factor for all.

    Args:
        fit: of the cells so far.
        candidates: of each factor its values, (M,), > 0.
        target: name of a quantity, or the factors of a place whose loss is to be forecast; default: the exponent whose
            interval is widest for its value.
        cost_M: of each candidate, > 0, in any unit: FLOPs, hours.

    Returns:
        The candidates, the best first.

    Raises:
        ValueError: the target is unknown, or costs do not fit.
    """
    log_MK = fit.log_factors(candidates)
    if cost_M is not None and (cost_M.shape != (len(log_MK),) or not (cost_M > 0).all()):
        raise ValueError(f"costs of shape {cost_M.shape} for {len(log_MK)} candidates: one above 0 for each")
    name, gradient_P = _target(fit, target)
    jacobian_MP = fit.form.log_loss(fit.theta[None], log_MK)[1][0]
    towards_MP = jacobian_MP @ fit.covariance
    removed_M = (towards_MP @ gradient_P) ** 2 / (1 + (towards_MP * jacobian_MP).sum(axis=1))
    cut_M = removed_M / (gradient_P @ fit.covariance @ gradient_P)
    value_M = cut_M if cost_M is None else cut_M / cost_M
    places = [{factor: float(values[i]) for factor, values in candidates.items()} for i in range(len(log_MK))]
    best_first = np.argsort(-value_M, kind="stable")
    return [NextCell(int(i), places[i], name, float(cut_M[i]), float(value_M[i])) for i in best_first]


def _target(fit: Fit, target: str | Mapping[str, float] | None) -> tuple[str, np.ndarray]:
    """Name of the target and the gradient (P,) of its logarithm."""
    if isinstance(target, Mapping):
        log_1K = log_factors(fit.form.factors, {name: np.array([value]) for name, value in target.items()}) - fit.centre
        place = ", ".join(f"{name}={value:g}" for name, value in target.items())
        return f"loss at {place}", fit.form.log_loss(fit.theta[None], log_1K)[1][0, 0]
    quantities = {q.name: q for q in fit.form.quantities(fit.centre) if q.exponents_of}
    if target is None:
        widths = {name: fit.estimates[name] for name in quantities}
        target = max(widths, key=lambda name: (widths[name].high - widths[name].low) / widths[name].value)
    if target not in quantities:
        raise ValueError(f"target {target!r} is not an exponent of a {fit.form.name}: one of {sorted(quantities)}")
    return target, quantities[target].at(fit.theta[None])[1][0]
