"""Cells that are worth running next, with their price in operations and hours."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from userrep.scaling.design import next_cells
from userrep.scaling.fit import Fit
from userrep.scaling.records import NextStep
from userrep.scaling.runs import FACTOR_COLUMNS, Place

MAX_RELATIVE_PRICE = 4.0  # times the dearest cell of the sweep: what a candidate may cost
MIN_VARIANCE_CUT = 0.1  # a candidate that cuts less is not worth a run, however cheap it is
MAX_STEP = 4.0  # times the largest value of a factor
CANDIDATES_PER_FACTOR = {1: 60, 2: 16}


@dataclass(frozen=True)
class PriceList:
    """Operations of a run at places that have not been run, from those that have.

    Attributes:
        weights: of 1, log N, log D, log S, log B in log C, least squares; 0 for a factor that does not vary.
        means: of the log factors.
        highest: price of the dearest cell so far.
        flops_per_s: of the sweep; None where it was not measured.
    """

    weights: tuple[float, ...]
    means: tuple[float, ...]
    highest: float
    flops_per_s: float | None

    def flops(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Operations (M,) at places of the factors N, D, S, B."""
        log_MK = np.log(np.stack([factors[name] for name in FACTOR_COLUMNS], axis=1)) - np.array(self.means)
        return np.exp(self.weights[0] + log_MK @ np.array(self.weights[1:]))

    def hours(self, flops: float) -> float | None:
        """Time on the device of the sweep."""
        return None if self.flops_per_s is None else flops / self.flops_per_s / 3600


def make_price_list(places: Sequence[Place], flops_per_s: float | None) -> PriceList:
    """A power law of compute in the factors, fitted to at least one place."""
    log_MK = np.log([[place.factors[name] for name in FACTOR_COLUMNS] for place in places])
    means_K = log_MK.mean(axis=0)
    columns_MT = np.concatenate([np.ones((len(log_MK), 1)), log_MK - means_K], axis=1)
    compute_M = np.array([place.compute for place in places])
    # The solution of least norm: factors that do not vary, or vary as another, get no weight of their own.
    weights_T = np.linalg.lstsq(columns_MT, np.log(compute_M), rcond=1e-9)[0]
    return PriceList(tuple(weights_T.tolist()), tuple(means_K.tolist()), float(compute_M.max()), flops_per_s)


def choose_next(fit: Fit, held: Mapping[str, float], prices: PriceList) -> tuple[NextStep, ...]:
    """The cell that tells most of an exponent for its price, and the one after which a larger cell is forecast best.

    Args:
        fit: whose exponent of the widest interval is to be known better.
        held: the factors that the law does not have; empty for a law in C.
        prices: of cells.

    Returns:
        None to two cells: those that cut at least MIN_VARIANCE_CUT of a variance.
    """
    names, cells = fit.form.factors, fit.cells
    axes = [_axis(cells.factors[name], CANDIDATES_PER_FACTOR[len(names)]) for name in names]
    candidates = dict(zip(names, (grid.ravel() for grid in np.meshgrid(*axes)), strict=True))
    flops_M = _flops(candidates, held, prices)
    kept = np.flatnonzero(flops_M <= MAX_RELATIVE_PRICE * prices.highest)
    if not len(kept):
        return ()
    candidates, flops_M = {name: values[kept] for name, values in candidates.items()}, flops_M[kept]
    beyond = {name: MAX_STEP * float(cells.factors[name].max()) for name in names}
    ranked = {
        "exponent": next_cells(fit, candidates, cost_M=flops_M),
        "forecast": next_cells(fit, candidates, target=beyond),
    }
    steps = []
    for rule, found in ranked.items():
        best = next((cell for cell in found if cell.variance_cut >= MIN_VARIANCE_CUT), None)
        if best is not None:
            flops = float(flops_M[best.candidate])
            steps.append(
                NextStep(rule, best.target, {**held, **best.factors}, best.width_cut, flops, prices.hours(flops))
            )
    return tuple(steps)


def _flops(candidates: Mapping[str, np.ndarray], held: Mapping[str, float], prices: PriceList) -> np.ndarray:
    if "C" in candidates:
        return candidates["C"]
    num = len(next(iter(candidates.values())))
    return prices.flops({name: candidates.get(name, np.full(num, held.get(name, 1.0))) for name in FACTOR_COLUMNS})


def _axis(values_M: np.ndarray, num: int) -> np.ndarray:
    """Round numbers, each once; none below the smallest cell, where a law often does not hold yet."""
    values = np.geomspace(values_M.min(), MAX_STEP * values_M.max(), num)
    digits = 10.0 ** (np.floor(np.log10(values)) - 1)
    return np.unique(np.maximum(1.0, np.round(values / digits) * digits))


def elasticity(x_M: np.ndarray, compute_M: np.ndarray) -> float:
    """d log C / d log x over cells by least squares; 0 where x does not vary."""
    if math.isclose(x_M.min(), x_M.max()):
        return 0.0
    return float(np.polyfit(np.log(x_M), np.log(compute_M), 1)[0])
