"""Forms of a scaling law: log loss as a function of parameters and factors, and where to start looking for parameters.

Factors enter as natural logarithms minus their mean over the fitted cells, which keeps coefficients and exponents from
trading against each other in the solver. Parameters are those of the log-sum-exp form: logarithms of terms, exponents.

Legend: `R` parameter vectors taken at once (starts, or bootstrap resamples), `M` cells, `K` factors, `P` parameters.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.special import expit

EXPONENT_RANGE = (1e-3, 4.0)  # searched; published exponents of losses lie in 0.03..1
START_RANGE = (0.02, 2.0)  # of the grid of exponents; the polish may leave it
NUM_STARTS = 1500  # grid points over all exponents: 1,444 for two factors, 1,296 for four
MAX_STARTS_PER_FACTOR = 60
REWEIGHTINGS = 3  # of the inner problem: enough to tell a good grid point from a bad one; the polish does the rest
SMALLEST_TERM = 1e-5  # of the lowest loss: a term below it changes no log loss by more than that


@dataclass(frozen=True)
class Quantity:
    """Something that a fitted law says: a parameter, or a function of parameters.

    Attributes:
        name: `irreducible_loss`, `coefficient_N`, `exponent_N`, ...
        at: theta_RP -> its values (R,) and their gradients (R, P).
        to_reported: from the scale of `at`, on which errors are about symmetric, to what is reported; rises.
        exponents_of: factors whose range it rests on: those of an exponent; empty for any other quantity.
    """

    name: str
    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    to_reported: Callable[[float], float] = math.exp
    exponents_of: tuple[str, ...] = ()


class Form(Protocol):
    """What a solver needs to know about a law."""

    @property
    def name(self) -> str:
        """For tables."""
        ...

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the K factors, in the order of the columns of `log_MK`."""
        ...

    @property
    def num_parameters(self) -> int:
        """P."""
        ...

    @property
    def min_sizes(self) -> int:
        """Different values that every factor must have for its parameters to be determined."""
        ...

    def log_loss(self, theta_RP: np.ndarray, log_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log loss (R, M) and its Jacobian (R, M, P)."""
        ...

    def bounds(self, log_MK: np.ndarray, log_loss_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest parameters, (P,) each."""
        ...

    def starts(self, log_MK: np.ndarray, log_loss_M: np.ndarray, delta: float) -> np.ndarray:
        """Parameter vectors (R, P) over the range of exponents, linear parameters solved for each."""
        ...

    def quantities(self, centre_K: np.ndarray) -> list[Quantity]:
        """What is reported; `centre_K` was subtracted from the logarithms of the factors."""
        ...


@dataclass(frozen=True)
class PowerLaw:
    """L = E + sum over factors of A_k * x_k ** -alpha_k; without floor, E = 0.

    theta is [log E, log A_1 .. log A_K, alpha_1 .. alpha_K] with A_k at the centre of the cells.

    Source: arXiv 2203.15556, section 3.3 (approach 3), and its log-sum-exp form in appendix D.2. Variable projection:
    given the exponents, the rest is a linear problem (Golub and Pereyra 1973); for scaling laws,
    Open-Athena/scaling-law-analysis.
    Differs: any number of factors; the inner problem is least squares of relative residuals, reweighted towards the
    Huber loss; a term that comes out negative is dropped and the others are solved again.

    Attributes:
        factors: what varies: `("C",)`, `("N", "D")`, ...
        has_floor: whether there is an irreducible loss E.
    """

    factors: tuple[str, ...]
    has_floor: bool = True

    @property
    def name(self) -> str:
        """For tables."""
        return f"power law in {', '.join(self.factors)} {'with' if self.has_floor else 'without'} floor"

    @property
    def num_parameters(self) -> int:
        """P."""
        return 2 * len(self.factors) + self.has_floor

    @property
    def min_sizes(self) -> int:
        """Two points make a power law; a third tells it from its floor."""
        return 2 + self.has_floor

    def log_loss(self, theta_RP: np.ndarray, log_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log loss (R, M) and its Jacobian (R, M, P)."""
        num_terms = self.num_parameters - len(self.factors)
        terms_RMT = np.repeat(theta_RP[:, None, :num_terms], len(log_MK), axis=1)
        terms_RMT[:, :, self.has_floor :] -= theta_RP[:, None, num_terms:] * log_MK
        top_RM1 = terms_RMT.max(axis=2, keepdims=True)
        shares_RMT = np.exp(terms_RMT - top_RM1)
        total_RM1 = shares_RMT.sum(axis=2, keepdims=True)
        shares_RMT /= total_RM1
        slopes_RMK = -shares_RMT[:, :, self.has_floor :] * log_MK
        return (top_RM1 + np.log(total_RM1))[:, :, 0], np.concatenate([shares_RMT, slopes_RMK], axis=2)

    def bounds(self, log_MK: np.ndarray, log_loss_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Terms from SMALLEST_TERM of the lowest loss to e times the highest; exponents in EXPONENT_RANGE; (P,)."""
        num_factors, num_terms = len(self.factors), self.num_parameters - len(self.factors)
        low, high = log_loss_M.min() + np.log(SMALLEST_TERM), log_loss_M.max() + 1
        return (
            np.repeat([low, EXPONENT_RANGE[0]], [num_terms, num_factors]),
            np.repeat([high, EXPONENT_RANGE[1]], [num_terms, num_factors]),
        )

    def starts(self, log_MK: np.ndarray, log_loss_M: np.ndarray, delta: float) -> np.ndarray:
        """The best terms for every point of a grid of exponents."""
        num_factors = len(self.factors)
        per_factor = min(MAX_STARTS_PER_FACTOR, int(NUM_STARTS ** (1 / num_factors)))
        axis = np.geomspace(*START_RANGE, per_factor)
        exponents_RK = np.stack([grid.ravel() for grid in np.meshgrid(*[axis] * num_factors)], axis=1)
        powers_RMK = np.exp(-exponents_RK[:, None] * log_MK)
        floor_RM1 = np.ones((*powers_RMK.shape[:2], int(self.has_floor)))
        # Divided by the loss, residuals of the linear problem are those of log loss to first order.
        columns_RMT = np.concatenate([floor_RM1, powers_RMK], axis=2) / np.exp(log_loss_M)[:, None]
        terms_RT = solve_linear(columns_RMT, np.ones(len(log_loss_M)), delta, non_negative=True)
        low, high = np.exp(log_loss_M.min()) * SMALLEST_TERM, np.exp(log_loss_M.max() + 1)
        return np.concatenate([np.log(np.clip(terms_RT, low, high)), exponents_RK], axis=1)

    def quantities(self, centre_K: np.ndarray) -> list[Quantity]:
        """E; coefficients at x = 1 and exponents; for several factors also how compute is best divided among them."""
        num_terms = self.num_parameters - len(self.factors)
        found = [Quantity("irreducible_loss", _floor, lambda value: max(value, 0.0))] if self.has_floor else []
        for k, factor in enumerate(self.factors):
            at_one = np.zeros(self.num_parameters)
            at_one[self.has_floor + k], at_one[num_terms + k] = 1.0, centre_K[k]
            found += [Quantity(f"coefficient_{factor}", linear(at_one))]
            found += [Quantity(f"exponent_{factor}", log_of(num_terms + k), exponents_of=(factor,))]
        for k, factor in enumerate(self.factors if len(self.factors) > 1 else ()):
            share = _log_odds_of_share(num_terms, k)
            found += [Quantity(f"compute_exponent_{factor}", share, lambda odds: float(expit(odds)), self.factors)]
        return found


def linear(weights_P: np.ndarray, offset: float = 0.0) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A `Quantity.at` that is linear in the parameters."""
    return lambda theta_RP: (theta_RP @ weights_P + offset, np.broadcast_to(weights_P, theta_RP.shape))


def _floor(theta_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E itself: its logarithm has no bound below where the data allow E = 0."""
    gradient_RP = np.zeros_like(theta_RP)
    gradient_RP[:, 0] = np.exp(theta_RP[:, 0])
    return gradient_RP[:, 0], gradient_RP


def log_of(index: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A `Quantity.at`: the logarithm of a parameter."""

    def at(theta_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        gradient_RP = np.zeros_like(theta_RP)
        gradient_RP[:, index] = 1 / theta_RP[:, index]
        return np.log(theta_RP[:, index]), gradient_RP

    return at


def _log_odds_of_share(first: int, k: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Where compute is the product of the factors, the best x_k grows as compute to the power share_k.

    All terms then fall at the same rate, alpha_j * share_j is the same for all j, and the shares add up to 1: share_k
    is (1 / alpha_k) / sum of 1 / alpha_j; for two factors beta / (alpha + beta).

    Source: arXiv 2203.15556, equation 4. Differs: any number of factors.
    """

    def at(theta_RP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inverse_RK = 1 / theta_RP[:, first:]
        others_R = inverse_RK.sum(axis=1) - inverse_RK[:, k]
        gradient_RP = np.zeros_like(theta_RP)
        gradient_RP[:, first:] = inverse_RK**2 / others_R[:, None]
        gradient_RP[:, first + k] = -inverse_RK[:, k]
        return np.log(inverse_RK[:, k] / others_R), gradient_RP

    return at


def solve_linear(columns_RMT: np.ndarray, target_M: np.ndarray, delta: float, *, non_negative: bool) -> np.ndarray:
    """Coefficients (R, T) of R linear problems under a Huber loss of `delta`, nearly: by a few reweightings."""
    norms_R1T = np.sqrt((columns_RMT**2).sum(axis=1, keepdims=True))
    columns_RMT = columns_RMT / norms_R1T
    weights_RM = np.ones(columns_RMT.shape[:2])
    num_terms = columns_RMT.shape[2]
    solution_RT = np.zeros((len(columns_RMT), num_terms))
    for _ in range(1 + REWEIGHTINGS):
        weighted_RTM = (columns_RMT * weights_RM[:, :, None]).transpose(0, 2, 1)
        # Terms of nearly equal exponents are nearly parallel; the ridge keeps them finite.
        products_RTT = weighted_RTM @ columns_RMT + 1e-10 * weights_RM.sum(axis=1)[:, None, None] * np.eye(num_terms)
        sums_RT = weighted_RTM @ target_M
        is_used_RT = np.ones_like(sums_RT, dtype=bool)
        for _ in range(num_terms if non_negative else 1):
            both_RTT = is_used_RT[:, :, None] & is_used_RT[:, None, :]
            system_RTT = np.where(both_RTT, products_RTT, 0) + (~is_used_RT)[:, :, None] * np.eye(num_terms)
            solution_RT = np.linalg.solve(system_RTT, np.where(is_used_RT, sums_RT, 0)[:, :, None])[:, :, 0]
            is_used_RT &= solution_RT > 0
        residual_RM = np.abs(target_M - (columns_RMT @ solution_RT[:, :, None])[:, :, 0])
        weights_RM = delta / np.maximum(residual_RM, delta)
    return solution_RT / norms_R1T[:, 0]
