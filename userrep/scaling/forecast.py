"""Tests of a law by what it was not fitted to: forecasts of the largest cells, errors of rival forms, residuals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from userrep.scaling.cells import Cells, log_factors
from userrep.scaling.fit import NUM_RESAMPLES, Fit, fit_law, fit_point
from userrep.scaling.forms import Form
from userrep.scaling.solver import HUBER_DELTA

NUM_FOLDS = 5
HELD_SHARE = 0.2  # of the cells, the largest, that rival forms must forecast


@dataclass(frozen=True)
class Forecast:
    """A held-out cell beside what the law said of it.

    Attributes:
        cell: its position among all cells.
        factors: its place.
        measured: its loss.
        predicted: by a law that has not seen it.
        low: end of the 95% interval of a run there, which holds the noise of the run.
        high: the other end.
    """

    cell: int
    factors: dict[str, float]
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.low <= self.measured <= self.high

    @property
    def log_error(self) -> float:
        """log(measured / predicted): 0.01 is 1% above the forecast."""
        return math.log(self.measured / self.predicted)


@dataclass(frozen=True)
class Comparison:
    """How well a form does on cells that it has not seen; errors are root mean squares of log loss.

    Attributes:
        form: compared.
        seen_error: on the cells it is fitted to, which more parameters always lower.
        fold_error: on folds that are left out one after another: between the other cells, mostly.
        largest_error: on the largest cells, left out together: beyond the other cells, as a forecast is.
        refusal: why the form cannot be compared; its errors are then infinite.
    """

    form: Form
    seen_error: float
    fold_error: float
    largest_error: float
    refusal: str | None = None


@dataclass(frozen=True)
class Residual:
    """How far a cell is from the law.

    Attributes:
        cell: its position.
        factors: its place.
        measured: its loss.
        fitted: by the law.
        log_residual: log(measured / fitted): 0.01 is 1% above the law.
        standardised: the same over its standard deviation, which is smaller where a cell pulls the law to itself.
    """

    cell: int
    factors: dict[str, float]
    measured: float
    fitted: float
    log_residual: float
    standardised: float


def forecast_largest(
    form: Form,
    cells: Cells,
    num_held: int = 1,
    *,
    num_resamples: int = NUM_RESAMPLES,
    delta: float = HUBER_DELTA,
    seed: int = 0,
) -> tuple[Fit, list[Forecast]]:
    """Fits a law without the largest cells and forecasts them.

    Args:
        form: of the law.
        cells: all of them; the largest are those of the most compute (see `Cells`).
        num_held: cells that are held out, >= 1.
        num_resamples: as in `fit_law`.
        delta: as in `fit_law`.
        seed: as in `fit_law`.

    Returns:
        The fit of the smaller cells, and the forecasts, smallest cell first.

    Raises:
        ValueError: none is held out, or the smaller cells cannot determine the parameters.
    """
    if num_held < 1:
        raise ValueError(f"num_held is {num_held}: a forecast is tested on at least one cell")
    order_M = cells.by_size()
    fit = fit_law(form, cells.take(order_M[:-num_held]), num_resamples=num_resamples, delta=delta, seed=seed)
    held = cells.take(order_M[-num_held:])
    predicted_M, (low_M, high_M) = fit.predict(held.factors), fit.intervals(held.factors, of_cell=True)
    columns = np.stack([held.loss, predicted_M, low_M, high_M], axis=1).tolist()
    return fit, [
        Forecast(int(cell), cells.place(cell), *row) for cell, row in zip(order_M[-num_held:], columns, strict=True)
    ]


def compare_forms(forms: Sequence[Form], cells: Cells, *, delta: float = HUBER_DELTA) -> list[Comparison]:
    """Compares forms by their errors on cells that they have not seen; the best forecaster of the largest comes first.

    The largest HELD_SHARE of the cells are held out together; for the folds, cells are dealt in turn by size, so every
    fold has small and large ones. A form that the remaining cells cannot determine comes last, with the reason.
    """
    found = []
    for form in forms:
        try:
            found.append(_compare(form, cells, delta))
        except ValueError as error:
            found.append(Comparison(form, math.inf, math.inf, math.inf, str(error)))
    return sorted(found, key=lambda comparison: comparison.largest_error)


def residual_table(fit: Fit) -> list[Residual]:
    """Every cell of a fit, the worst first."""
    fitted_M, log_MK = fit.predict(fit.cells.factors), fit.log_factors(fit.cells.factors)
    log_residual_M = np.log(fit.cells.loss / fitted_M)
    jacobian_MP = fit.form.log_loss(fit.theta[None], log_MK)[1][0]
    leverage_M = np.einsum("mp,pq,mq->m", jacobian_MP, fit.covariance, jacobian_MP)
    standardised_M = log_residual_M / (fit.noise * np.sqrt(np.maximum(1 - leverage_M, 1e-6)))
    columns = np.stack([fit.cells.loss, fitted_M, log_residual_M, standardised_M], axis=1).tolist()
    worst_first = np.argsort(-np.abs(standardised_M), kind="stable")
    return [Residual(int(cell), fit.cells.place(cell), *columns[cell]) for cell in worst_first]


def _compare(form: Form, cells: Cells, delta: float) -> Comparison:
    num_cells, order_M = len(cells), cells.by_size()
    seen_M = _errors(form, cells, np.zeros(num_cells, dtype=bool), delta)
    is_largest_M = np.zeros(num_cells, dtype=bool)
    is_largest_M[order_M[-max(1, round(HELD_SHARE * num_cells)) :]] = True
    fold_M = np.empty(num_cells, dtype=int)
    fold_M[order_M] = np.arange(num_cells) % NUM_FOLDS
    folds = [_errors(form, cells, fold_M == fold, delta) for fold in range(min(NUM_FOLDS, num_cells))]
    largest_M = _errors(form, cells, is_largest_M, delta)
    return Comparison(
        form, _root_mean_square(seen_M), _root_mean_square(np.concatenate(folds)), _root_mean_square(largest_M)
    )


def _errors(form: Form, cells: Cells, is_held_M: np.ndarray, delta: float) -> np.ndarray:
    """Log errors of the held-out cells; of all, where none is held out."""
    centre_K, theta_P = fit_point(form, cells.take(~is_held_M), delta)
    judged = cells.take(is_held_M) if is_held_M.any() else cells
    log_MK = log_factors(form.factors, judged.factors) - centre_K
    return np.log(judged.loss) - form.log_loss(theta_P[None], log_MK)[0][0]


def _root_mean_square(values_M: np.ndarray) -> float:
    return float(np.sqrt((values_M**2).mean()))
