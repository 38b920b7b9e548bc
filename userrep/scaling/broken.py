"""A power law with a break: another exponent beyond some size.

Legend: as in `userrep.scaling.forms`.
"""

from dataclasses import dataclass

import numpy as np

from userrep.scaling.forms import EXPONENT_RANGE, MAX_STARTS_PER_FACTOR, Quantity, linear, log_of, solve_linear

BREAK_WIDTH = 0.25  # assumption: natural log units; the bend takes a factor of about e in the factor
BREAK_MARGIN = 0.1  # share of the range at either end where no break is looked for: one side would hold no cell


@dataclass(frozen=True)
class BrokenPowerLaw:
    """One factor, one exponent below a break and another above it: L = A * x ** -below, bending smoothly to -above.

    theta is [log L at the centre were there no break, exponent below, exponent above, log of the break]. Given the
    break, log loss is linear in the rest.

    Source: arXiv 2210.14891, equation 1 with one break.
    Differs: no floor, and the width of the bend is fixed (BREAK_WIDTH): a sweep has too few cells to determine either.

    Attributes:
        factor: what varies.
    """

    factor: str

    @property
    def name(self) -> str:
        """For tables."""
        return f"broken power law in {self.factor}"

    @property
    def factors(self) -> tuple[str, ...]:
        """The one factor."""
        return (self.factor,)

    @property
    def num_parameters(self) -> int:
        """P."""
        return 4

    @property
    def min_sizes(self) -> int:
        """Two points for either line."""
        return 4

    def log_loss(self, theta_RP: np.ndarray, log_MK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Log loss (R, M) and its Jacobian (R, M, P)."""
        level_R1, below_R1, above_R1, break_R1 = np.split(theta_RP, 4, axis=1)
        beyond_RM = _softplus(log_MK[:, 0] - break_R1)
        before_RM = log_MK[:, 0] - beyond_RM
        is_beyond_RM = 0.5 + 0.5 * np.tanh((log_MK[:, 0] - break_R1) / (2 * BREAK_WIDTH))
        slope_RM = (above_R1 - below_R1) * is_beyond_RM
        jacobian_RMP = np.stack([np.ones_like(beyond_RM), -before_RM, -beyond_RM, slope_RM], axis=2)
        return level_R1 - below_R1 * before_RM - above_R1 * beyond_RM, jacobian_RMP

    def bounds(self, log_MK: np.ndarray, log_loss_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The break lies within the cells."""
        low, high = log_MK.min(), log_MK.max()
        margin, level = BREAK_MARGIN * (high - low), EXPONENT_RANGE[1] * (high - low)
        return (
            np.array([log_loss_M.min() - level, EXPONENT_RANGE[0], EXPONENT_RANGE[0], low + margin]),
            np.array([log_loss_M.max() + level, EXPONENT_RANGE[1], EXPONENT_RANGE[1], high - margin]),
        )

    def starts(self, log_MK: np.ndarray, log_loss_M: np.ndarray, delta: float) -> np.ndarray:
        """The best level and exponents for breaks all over the cells."""
        low, high = self.bounds(log_MK, log_loss_M)
        break_R1 = np.linspace(low[3], high[3], MAX_STARTS_PER_FACTOR)[:, None]
        beyond_RM = _softplus(log_MK[:, 0] - break_R1)
        columns_RMT = np.stack([np.ones_like(beyond_RM), beyond_RM - log_MK[:, 0], -beyond_RM], axis=2)
        lines_RT = solve_linear(columns_RMT, log_loss_M, delta, non_negative=False)
        return np.clip(np.concatenate([lines_RT, break_R1], axis=1), low, high)

    def quantities(self, centre_K: np.ndarray) -> list[Quantity]:
        """Both exponents, and where the break is."""
        at_break = np.array([0.0, 0.0, 0.0, 1.0])
        return [
            Quantity(f"exponent_{self.factor}_below", log_of(1), exponents_of=self.factors),
            Quantity(f"exponent_{self.factor}_above", log_of(2), exponents_of=self.factors),
            Quantity(f"break_{self.factor}", linear(at_break, float(centre_K[0]))),
        ]


def _softplus(distance_RM: np.ndarray) -> np.ndarray:
    return BREAK_WIDTH * np.logaddexp(0, distance_RM / BREAK_WIDTH)
