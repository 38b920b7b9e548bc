"""Fits a scaling law to the cells of a sweep, with intervals that hold at 6 to 30 cells, and says what it cannot say.

Intervals are bootstrap-t. With few cells, percentiles of resampled fits are too narrow, because they take the spread of
the residuals for known: of 6 cells, by more than a tenth. So the deviation of every resample is divided by its own
standard error, and the quantiles of that ratio are multiplied by the standard error of the fit. Errors are drawn from
the residuals and smoothed by a normal kernel: a Huber loss of small delta is nearly a sum of absolute values, whose
resamples of bare residuals pile up on a few values.

Legend: `R` resamples, `M` cells, `K` factors, `P` parameters, `T` residuals that tell of the noise.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from userrep.scaling.cells import Cells, log_factors
from userrep.scaling.forms import EXPONENT_RANGE, Form, Quantity
from userrep.scaling.solver import HUBER_DELTA, RESAMPLE, best_parameters, descend

NUM_RESAMPLES = 1000
TAILS = (0.025, 0.975)  # of every interval
KERNEL_SHARE = 0.25  # of the variance of a drawn error is the kernel's: its width is half a standard deviation
MIN_DECADES = 1.0  # of compute, and of its own factor, that an exponent needs to be stated
MAX_RELATIVE_WIDTH = 0.5  # of the interval of an exponent that is stated
LEAST_NOISE = 1e-12  # of log loss: cells without noise get intervals of next to no width instead of 0 / 0


@dataclass(frozen=True)
class Estimate:
    """A number with its 95% interval, or why it is not stated.

    Attributes:
        name: as in `Quantity`.
        value: of the fit.
        low: end of the 95% interval.
        high: the other end.
        refusals: why the value must not be quoted; empty where it may be.
    """

    name: str
    value: float
    low: float
    high: float
    refusals: tuple[str, ...] = ()

    @property
    def is_stated(self) -> bool:
        """Whether the value may be quoted."""
        return not self.refusals

    def __str__(self) -> str:
        """For people: a value that may not be quoted is not shown."""
        if self.refusals:
            return f"{self.name} is not stated: {'; '.join(self.refusals)}"
        return f"{self.name} = {self.value:.4g} (95% interval {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, eq=False)
class Fit:
    """A law with its resamples; `fit_law` makes it.

    Attributes:
        form: of the law.
        cells: that it was fitted to.
        centre: mean log factors, (K,), from which the parameters count.
        theta: parameters, (P,).
        noise: standard deviation of log loss about the law; 0.01 is 1% of the loss.
        resampled: parameters of every resample, (R, P).
        resampled_noise: likewise, (R,).
        errors: for every resample a draw of the noise of one more cell, (R,).
    """

    form: Form
    cells: Cells
    centre: np.ndarray
    theta: np.ndarray
    noise: float
    resampled: np.ndarray
    resampled_noise: np.ndarray
    errors: np.ndarray

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every quantity of the form by its name."""
        return {quantity.name: self._estimate(quantity) for quantity in self.form.quantities(self.centre)}

    @property
    def r_squared(self) -> float:
        """Share of the variance of log loss that the law explains, on the cells that it was fitted to."""
        log_loss_M = np.log(self.cells.loss)
        left_M = log_loss_M - np.log(self.predict(self.cells.factors))
        return 1 - float((left_M**2).sum() / ((log_loss_M - log_loss_M.mean()) ** 2).sum())

    @cached_property
    def covariance(self) -> np.ndarray:
        """Covariance (P, P) of the parameters per unit of noise variance, to first order (delta method)."""
        return _covariance(self.form, self.theta[None], self.log_factors(self.cells.factors))[0]

    @cached_property
    def _resampled_covariance(self) -> np.ndarray:
        return _covariance(self.form, self.resampled, self.log_factors(self.cells.factors))

    def log_factors(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Centred log factors (M, K) of any places."""
        return log_factors(self.form.factors, factors) - self.centre

    def predict(self, factors: Mapping[str, np.ndarray]) -> np.ndarray:
        """Loss (M,) by the law, at any places."""
        return np.exp(self.form.log_loss(self.theta[None], self.log_factors(factors))[0][0])

    def intervals(self, factors: Mapping[str, np.ndarray], *, of_cell: bool) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends (M,) of 95% intervals of the loss at any places.

        Args:
            factors: of the places.
            of_cell: whether of what a run there would measure, with its noise; otherwise of the law, for a band.
        """
        ends = []
        for log_K in self.log_factors(factors):  # the Jacobians of all resamples at all places would be large
            value_11, gradient_11P = self.form.log_loss(self.theta[None], log_K[None])
            values_R1, gradient_R1P = self.form.log_loss(self.resampled, log_K[None])
            values_R = values_R1[:, 0] - of_cell * self.errors
            ends.append(self._ends(value_11[0, 0], gradient_11P[:, 0], values_R, gradient_R1P[:, 0], float(of_cell)))
        low_M, high_M = np.exp(np.array(ends).reshape(-1, 2)).T
        return low_M, high_M

    def change(self, name: str, start: Mapping[str, float], end: Mapping[str, float]) -> Estimate:
        """log(loss at `end` / loss at `start`) by the law: -0.01 is a loss that is 1% lower; never refused.

        Args:
            name: of the estimate.
            start: factors of a place.
            end: factors of another, not the same.
        """
        places = {factor: np.array([start[factor], end[factor]]) for factor in self.form.factors}
        values_R2, gradients_R2P = self.form.log_loss(self.resampled, self.log_factors(places))
        values_12, gradients_12P = self.form.log_loss(self.theta[None], self.log_factors(places))
        value, gradient_1P = float(values_12[0, 1] - values_12[0, 0]), gradients_12P[:, 1] - gradients_12P[:, 0]
        changes_R = values_R2[:, 1] - values_R2[:, 0]
        low, high = self._ends(value, gradient_1P, changes_R, gradients_R2P[:, 1] - gradients_R2P[:, 0])
        return Estimate(name, value, float(low), float(high))

    def _ends(
        self,
        value: float,
        gradient_1P: np.ndarray,
        values_R: np.ndarray,
        gradient_RP: np.ndarray,
        own_variance: float = 0.0,
    ) -> tuple[float, float]:
        """Bootstrap-t interval of a quantity; `own_variance` in units of the noise's."""
        factor = math.sqrt(own_variance + _quadratic(gradient_1P, self.covariance[None])[0])
        factors_R = np.sqrt(own_variance + _quadratic(gradient_RP, self._resampled_covariance))
        low, high = np.quantile((values_R - value) / (self.resampled_noise * factors_R), TAILS)
        return value - high * self.noise * factor, value - low * self.noise * factor

    def _estimate(self, quantity: Quantity) -> Estimate:
        (value,), gradient_1P = quantity.at(self.theta[None])
        ends = self._ends(value, gradient_1P, *quantity.at(self.resampled))
        # math.exp refuses what is beyond: an end at e**700 says that there is no end.
        value, low, high = (quantity.to_reported(float(np.clip(end, -700, 700))) for end in (value, *ends))
        estimate = Estimate(quantity.name, value, low, high)
        return replace(estimate, refusals=self._refusals(quantity, estimate)) if quantity.exponents_of else estimate

    def _refusals(self, quantity: Quantity, estimate: Estimate) -> tuple[str, ...]:
        columns = {name: self.cells.factors[name] for name in quantity.exponents_of}
        columns |= {} if self.cells.compute is None else {"compute": self.cells.compute}
        decades = {name: math.log10(values.max() / values.min()) for name, values in columns.items()}
        found = [
            f"{name} spans {span:.2f} decades, of at least {MIN_DECADES:g}"
            for name, span in decades.items()
            if span < MIN_DECADES - 1e-9
        ]
        width = (estimate.high - estimate.low) / estimate.value
        if not width <= MAX_RELATIVE_WIDTH:
            found.append(
                f"the 95% interval {estimate.low:.3g} to {estimate.high:.3g} is {width:.2g} times the value wide, "
                f"of at most {MAX_RELATIVE_WIDTH:g}"
            )
        lowest, highest = EXPONENT_RANGE
        # The exponents that a compute exponent is made of are looked at on their own.
        if len(quantity.exponents_of) == 1 and not lowest * (1 + 1e-6) < estimate.value < highest * (1 - 1e-6):
            found.append(f"the fit runs to {estimate.value:g}, an end of the range that is searched")
        return tuple(found)


def fit_law(
    form: Form, cells: Cells, *, num_resamples: int = NUM_RESAMPLES, delta: float = HUBER_DELTA, seed: int = 0
) -> Fit:
    """Fits a law under a Huber loss on log residuals, and resamples it.

    Source: loss from arXiv 2203.15556, section 3.3. Bootstrap-t from Efron and Tibshirani, An Introduction to the
    Bootstrap (1993), section 12.5. That it gains its accuracy for medians only with smoothing: Brown, Hall and Young,
    Biometrika 88 (2001).
    Differs: scaling-law papers resample cells (arXiv 2404.10102). Here errors are resampled: the places of the cells
    are chosen, not drawn, and a resample without the corners of the design knows less than the sweep does. Signs are
    random, because 20 residuals are too few to show that noise leans to one side.

    Args:
        form: of the law.
        cells: at least one more than the form has parameters.
        num_resamples: under 200, the ends of intervals are noisy.
        delta: of the Huber loss, in log loss, > 0; far below the noise it is a median, far above it least squares.
        seed: of the resamples.

    Raises:
        ValueError: the cells cannot determine the parameters.
    """
    centre_K, theta_P = fit_point(form, cells, delta)
    log_MK, num_cells = log_factors(form.factors, cells.factors) - centre_K, len(cells)
    fitted_M = form.log_loss(theta_P[None], log_MK)[0][0]
    residual_M = np.log(cells.loss) - fitted_M
    telling_T = residual_M[np.argsort(np.abs(residual_M), kind="stable")[form.num_parameters :]]
    noise = float(_noise(residual_M, form.num_parameters))
    rng = np.random.default_rng(seed)
    # One more than there are cells: the noise of the cell that is forecast.
    size = (num_resamples, num_cells + 1)
    error_RM = math.sqrt(1 - KERNEL_SHARE) * rng.choice([-1, 1], size) * rng.choice(telling_T, size)
    error_RM += math.sqrt(KERNEL_SHARE) * noise * rng.standard_normal(size)
    drawn_RM = fitted_M + error_RM[:, :num_cells]
    resampled_RP = descend(form, np.tile(theta_P, (num_resamples, 1)), log_MK, drawn_RM, delta, RESAMPLE)
    resampled_noise_R = _noise(drawn_RM - form.log_loss(resampled_RP, log_MK)[0], form.num_parameters)
    return Fit(form, cells, centre_K, theta_P, noise, resampled_RP, resampled_noise_R, error_RM[:, num_cells])


def fit_point(form: Form, cells: Cells, delta: float = HUBER_DELTA) -> tuple[np.ndarray, np.ndarray]:
    """The law without intervals: mean log factors (K,) and parameters (P,).

    Raises:
        ValueError: the cells cannot determine the parameters.
    """
    if len(cells) <= form.num_parameters:
        raise ValueError(
            f"{len(cells)} cells for the {form.num_parameters} parameters of a {form.name}: it needs at least "
            f"{form.num_parameters + 1}; run more cells or fit a simpler form"
        )
    log_MK = log_factors(form.factors, cells.factors)
    for name, column_M in zip(form.factors, log_MK.T, strict=True):
        if len(np.unique(column_M)) < form.min_sizes:
            raise ValueError(
                f"{name} has {len(np.unique(column_M))} different values: a {form.name} needs at least {form.min_sizes}"
            )
    if np.ptp(cells.loss) == 0:
        raise ValueError(f"all {len(cells)} cells have the loss {cells.loss[0]:g}: there is nothing to fit")
    centre_K = log_MK.mean(axis=0)
    return centre_K, best_parameters(form, log_MK - centre_K, np.log(cells.loss), delta)


def _noise(residual_RM: np.ndarray, num_parameters: int) -> np.ndarray:
    """Standard deviation of the noise, (R,), from the mean absolute residual.

    One cell that went wrong moves the mean absolute value less than the mean square. A fit that is nearly a median
    passes through as many cells as it has parameters; their residuals tell nothing and are not counted (Koenker,
    Quantile Regression, 2005, section 2.2).
    """
    mean_R = np.abs(residual_RM).sum(axis=-1) / (residual_RM.shape[-1] - num_parameters)
    return np.maximum(LEAST_NOISE, math.sqrt(math.pi / 2) * mean_R)


def _quadratic(gradient_RP: np.ndarray, covariance_RPP: np.ndarray) -> np.ndarray:
    return np.einsum("rp,rpq,rq->r", gradient_RP, covariance_RPP, gradient_RP)


def _covariance(form: Form, theta_RP: np.ndarray, log_MK: np.ndarray) -> np.ndarray:
    jacobian_RMP = form.log_loss(theta_RP, log_MK)[1]
    # A floor near 0 has a column so small that it would be lost in the inverse.
    norm_R1P = np.maximum(np.sqrt((jacobian_RMP**2).sum(axis=1, keepdims=True)), 1e-100)
    unit_RMP = jacobian_RMP / norm_R1P
    products_RPP = unit_RMP.transpose(0, 2, 1) @ unit_RMP + 1e-10 * np.eye(form.num_parameters)
    return np.linalg.inv(products_RPP) / norm_R1P / norm_R1P.transpose(0, 2, 1)
