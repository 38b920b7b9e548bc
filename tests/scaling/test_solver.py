import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber

from userrep.scaling import solver
from userrep.scaling.forms import EXPONENT_RANGE, PowerLaw
from userrep.scaling.solver import EXACT, HUBER_DELTA, RESAMPLE, best_parameters, descend, huber_loss

FORM = PowerLaw(("N", "D"))


def draw(seed: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    """Centred log factors and log losses of 25 cells of a law with random constants."""
    rng = np.random.default_rng(seed)
    log_MK = rng.uniform(-4, 4, (25, 2))
    alpha, beta = rng.uniform(0.1, 0.6, 2)
    loss = rng.uniform(0.2, 2) + np.exp(-alpha * log_MK[:, 0]) + rng.uniform(0.3, 3) * np.exp(-beta * log_MK[:, 1])
    return log_MK, np.log(loss) + noise * rng.standard_normal(25)


def loss_of(theta_P: np.ndarray, log_MK: np.ndarray, log_loss_M: np.ndarray) -> float:
    return float(huber_loss(log_loss_M - FORM.log_loss(theta_P[None], log_MK)[0], HUBER_DELTA)[0])


def test_huber_loss_is_that_of_scipy() -> None:
    residual_RM = np.random.default_rng(0).normal(size=(3, 50)) * 2e-3
    assert huber_loss(residual_RM, 1e-3) == pytest.approx(huber(1e-3, residual_RM).sum(axis=1))


@pytest.mark.parametrize("seed", range(6))
def test_no_other_start_finds_a_lower_loss(seed: int) -> None:
    log_MK, log_loss_M = draw(seed)
    found = loss_of(best_parameters(FORM, log_MK, log_loss_M, HUBER_DELTA), log_MK, log_loss_M)
    rng = np.random.default_rng(seed)
    low_P, high_P = FORM.bounds(log_MK, log_loss_M)
    for start_P in rng.uniform([-2, -2, -2, 0.05, 0.05], [1, 1, 1, 1, 1], (10, 5)):
        rival = minimize(
            lambda theta_P: loss_of(theta_P, log_MK, log_loss_M) / HUBER_DELTA**2,
            np.clip(start_P, low_P, high_P),
            method="L-BFGS-B",
            bounds=list(zip(low_P, high_P, strict=True)),
        )
        assert found <= rival.fun * HUBER_DELTA**2 * (1 + 1e-6)


def test_a_law_without_noise_is_found_exactly() -> None:
    log_MK = draw(0)[0]
    truth = np.array([-0.3, 0.2, 0.5, 0.31, 0.47])
    found = best_parameters(FORM, log_MK, FORM.log_loss(truth[None], log_MK)[0][0], HUBER_DELTA)
    assert found == pytest.approx(truth, abs=1e-8)


def test_four_factors_and_a_floor_are_found() -> None:
    form, rng = PowerLaw(("N", "D", "S", "B")), np.random.default_rng(0)
    log_MK = rng.uniform(-4, 4, (30, 4))
    truth = np.array([-0.3, 0.2, 0.5, -0.5, 0.1, 0.31, 0.47, 0.2, 0.6])
    found = best_parameters(form, log_MK, form.log_loss(truth[None], log_MK)[0][0], HUBER_DELTA)
    assert found == pytest.approx(truth, abs=1e-7)


def test_a_law_without_floor_leaves_the_floor_at_its_bound() -> None:
    log_MK = draw(0)[0]
    truth = np.array([0.2, 0.5, 0.31, 0.47])
    log_loss_M = PowerLaw(("N", "D"), has_floor=False).log_loss(truth[None], log_MK)[0][0]
    found = best_parameters(FORM, log_MK, log_loss_M, HUBER_DELTA)
    assert np.exp(found[0]) <= 1e-4 * np.exp(log_loss_M.min())
    assert found[1:] == pytest.approx(truth, abs=1e-3)


def test_a_loss_that_rises_leaves_the_exponent_at_its_bound() -> None:
    log_M1 = np.linspace(-3, 3, 8)[:, None]
    found = best_parameters(PowerLaw(("C",), has_floor=False), log_M1, 0.1 * log_M1[:, 0], HUBER_DELTA)
    assert found[1] == EXPONENT_RANGE[0]


def test_resamples_reach_the_minimum_that_patience_reaches() -> None:
    log_MK, log_loss_M = draw(1)
    theta_P = best_parameters(FORM, log_MK, log_loss_M, HUBER_DELTA)
    rng = np.random.default_rng(0)
    drawn_RM = FORM.log_loss(theta_P[None], log_MK)[0] + 0.01 * rng.standard_normal((200, 25))
    start_RP = np.tile(theta_P, (200, 1))
    quick_RP, exact_RP = (
        descend(FORM, start_RP, log_MK, drawn_RM, HUBER_DELTA, effort) for effort in (RESAMPLE, EXACT)
    )
    # RESAMPLE says what it costs: a few hundredths of a standard error.
    assert (np.sqrt(((quick_RP - exact_RP) ** 2).mean(axis=0)) < 0.1 * exact_RP.std(axis=0)).all()


def test_batches_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    log_MK, log_loss_M = draw(2)
    drawn_RM = log_loss_M + 0.01 * np.random.default_rng(0).standard_normal((11, 25))
    start_RP = np.tile(best_parameters(FORM, log_MK, log_loss_M, HUBER_DELTA), (11, 1))
    together = descend(FORM, start_RP, log_MK, drawn_RM, HUBER_DELTA, RESAMPLE)
    monkeypatch.setattr(solver, "BATCH_NUMBERS", 3 * 25 * 5)
    in_batches = descend(FORM, start_RP, log_MK, drawn_RM, HUBER_DELTA, RESAMPLE)
    assert in_batches == pytest.approx(together, rel=1e-6)
