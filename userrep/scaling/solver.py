"""Parameters of a form that minimise a Huber loss on log residuals, for many starts or resamples in one go.

A thousand resamples are solved as one batch of small matrices, so a bootstrap costs about as much as a few dozen runs
of a general optimiser.

Legend: `R` starts or resamples, `M` cells, `K` factors, `P` parameters.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from userrep.scaling.forms import Form

HUBER_DELTA = 1e-3  # of log loss: arXiv 2203.15556, appendix D.2
POLISHED_STARTS = 16  # best points of the grid that are polished; neighbours of one minimum take up several
BATCH_NUMBERS = 2_000_000  # of Jacobians that are held at once: 16 MB
DAMPING = (1e-3, 1e-12, 1e6)  # at the start; the least; where no step helps any more
SETTLED_STEPS = 2  # in a row that gain nothing worth having


@dataclass(frozen=True)
class Effort:
    """How exactly a problem is solved.

    Attributes:
        max_steps: at the most.
        tolerance: gain of a step, relative to the loss, that is not worth having.
    """

    max_steps: int
    tolerance: float


ROUGH = Effort(60, 1e-4)  # to choose among starts
# Of 1,000 resamples of 25 cells, 3% are still moving after 100 steps; the root mean square distance to the minimum is
# 3% of the standard error of any parameter, which changes an interval by 0.1% of its width.
RESAMPLE = Effort(100, 1e-6)
EXACT = Effort(2000, 1e-12)


def huber_loss(residual_RM: np.ndarray, delta: float) -> np.ndarray:
    """Sum over cells of r ** 2 / 2 up to delta, of delta * (abs(r) - delta / 2) beyond; (R,)."""
    size_RM = np.abs(residual_RM)
    return np.where(size_RM <= delta, size_RM**2 / 2, delta * (size_RM - delta / 2)).sum(axis=-1)


def best_parameters(form: Form, log_MK: np.ndarray, log_loss_M: np.ndarray, delta: float) -> np.ndarray:
    """The parameters (P,) of least Huber loss: grid with inner linear problems, polish of the best, L-BFGS at the end.

    Source: arXiv 2203.15556, appendix D.2: L-BFGS from a grid of starts over all five parameters.
    Differs: the grid is over exponents only (see `PowerLaw`); what is minimised is the sum over cells, divided by delta
    squared: the loss is of the order of delta, and an optimiser with the usual tolerances stops early on its mean
    (Besiroglu et al., arXiv 2404.10102).
    """
    low_P, high_P = form.bounds(log_MK, log_loss_M)
    theta_RP = np.clip(form.starts(log_MK, log_loss_M, delta), low_P, high_P)
    loss_R = huber_loss(log_loss_M - form.log_loss(theta_RP, log_MK)[0], delta)
    theta_RP = theta_RP[np.argsort(loss_R, kind="stable")[:POLISHED_STARTS]]
    polished_RP = descend(form, theta_RP, log_MK, np.tile(log_loss_M, (len(theta_RP), 1)), delta, ROUGH)
    loss_R = huber_loss(log_loss_M - form.log_loss(polished_RP, log_MK)[0], delta)
    found_1P = descend(form, polished_RP[[np.argmin(loss_R)]], log_MK, log_loss_M[None], delta, EXACT)

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        fitted_1M, jacobian_1MP = form.log_loss(theta_P[None], log_MK)
        residual_M = log_loss_M - fitted_1M[0]
        gradient_P = -np.clip(residual_M, -delta, delta) @ jacobian_1MP[0]
        return float(huber_loss(residual_M, delta)) / delta**2, gradient_P / delta**2

    last = minimize(objective, found_1P[0], jac=True, method="L-BFGS-B", bounds=list(zip(low_P, high_P, strict=True)))
    return last.x if last.fun < objective(found_1P[0])[0] else found_1P[0]


def descend(
    form: Form, theta_RP: np.ndarray, log_MK: np.ndarray, log_loss_RM: np.ndarray, delta: float, effort: Effort
) -> np.ndarray:
    """Descends from each start to its local minimum; (R, P).

    Levenberg-Marquardt steps of the reweighted least-squares problem: a residual beyond delta gets the weight
    delta / abs(residual), so that the quadratic lies above the Huber loss and touches it. Parameters keep to their
    bounds.

    Args:
        form: of the law.
        theta_RP: starts, within bounds.
        log_MK: log factors, centred.
        log_loss_RM: what each start is to be fitted to.
        delta: of the Huber loss.
        effort: when to stop.
    """
    bounds = form.bounds(log_MK, log_loss_RM)
    size = max(1, BATCH_NUMBERS // (len(log_MK) * form.num_parameters))
    parts = [slice(first, first + size) for first in range(0, len(theta_RP), size)]
    return np.concatenate([_descend(form, theta_RP[i], log_MK, log_loss_RM[i], delta, effort, bounds) for i in parts])


def _descend(
    form: Form,
    theta_RP: np.ndarray,
    log_MK: np.ndarray,
    log_loss_RM: np.ndarray,
    delta: float,
    effort: Effort,
    bounds: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    theta_RP = theta_RP.copy()
    fitted_RM, jacobian_RMP = form.log_loss(theta_RP, log_MK)
    residual_RM = log_loss_RM - fitted_RM
    loss_R = huber_loss(residual_RM, delta)
    damping_R, settled_R = np.full(len(theta_RP), DAMPING[0]), np.zeros(len(theta_RP), dtype=int)
    moving = np.arange(len(theta_RP))
    for _ in range(effort.max_steps):
        step_RP = _steps(theta_RP[moving], residual_RM[moving], jacobian_RMP[moving], damping_R[moving], delta, bounds)
        tried_RP = np.clip(theta_RP[moving] + step_RP, *bounds)
        fitted_RM, tried_jacobian_RMP = form.log_loss(tried_RP, log_MK)
        tried_residual_RM = log_loss_RM[moving] - fitted_RM
        tried_loss_R = huber_loss(tried_residual_RM, delta)
        is_better_R = tried_loss_R < loss_R[moving]
        is_settled_R = is_better_R & (loss_R[moving] - tried_loss_R < effort.tolerance * loss_R[moving])
        settled_R[moving] = np.where(is_settled_R, settled_R[moving] + 1, np.where(is_better_R, 0, settled_R[moving]))
        damping_R[moving] *= np.where(is_better_R, 0.2, 8.0)
        better = moving[is_better_R]
        theta_RP[better], loss_R[better] = tried_RP[is_better_R], tried_loss_R[is_better_R]
        residual_RM[better], jacobian_RMP[better] = tried_residual_RM[is_better_R], tried_jacobian_RMP[is_better_R]
        damping_R = np.maximum(damping_R, DAMPING[1])
        moving = moving[(settled_R[moving] < SETTLED_STEPS) & (damping_R[moving] < DAMPING[2])]
        if not len(moving):
            break
    return theta_RP


def _steps(
    theta_RP: np.ndarray,
    residual_RM: np.ndarray,
    jacobian_RMP: np.ndarray,
    damping_R: np.ndarray,
    delta: float,
    bounds: tuple[np.ndarray, np.ndarray],
) -> np.ndarray:
    """Damped Gauss-Newton steps (R, P); a parameter at a bound that would leave it stays."""
    weighted_RPM = (jacobian_RMP * (delta / np.maximum(np.abs(residual_RM), delta))[:, :, None]).transpose(0, 2, 1)
    downhill_RP = (weighted_RPM @ residual_RM[:, :, None])[:, :, 0]
    curvature_RPP = weighted_RPM @ jacobian_RMP
    is_held_RP = ((theta_RP <= bounds[0]) & (downhill_RP < 0)) | ((theta_RP >= bounds[1]) & (downhill_RP > 0))
    diagonal_RP = np.diagonal(curvature_RPP, axis1=1, axis2=2)
    scale_RP = np.where(is_held_RP | (diagonal_RP <= 0), 1.0, diagonal_RP)
    curvature_RPP = np.where(is_held_RP[:, :, None] | is_held_RP[:, None, :], 0.0, curvature_RPP)
    damped_RP = (damping_R[:, None] + 1e-12) * scale_RP + is_held_RP
    system_RPP = curvature_RPP + damped_RP[:, :, None] * np.eye(theta_RP.shape[1])
    return np.linalg.solve(system_RPP, np.where(is_held_RP, 0.0, downhill_RP)[:, :, None])[:, :, 0]
