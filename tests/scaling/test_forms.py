import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, nnls

from userrep.scaling.broken import BREAK_WIDTH, BrokenPowerLaw
from userrep.scaling.forms import Form, PowerLaw, solve_linear

FORMS: list[Form] = [
    PowerLaw(("C",)),
    PowerLaw(("C",), has_floor=False),
    PowerLaw(("N", "D")),
    PowerLaw(("N", "D"), has_floor=False),
    PowerLaw(("N", "D", "S", "B")),
    BrokenPowerLaw("C"),
]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)


def draw(form: Form, seed: int, num_vectors: int = 3, num_cells: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Parameter vectors within the bounds, and centred log factors."""
    rng = np.random.default_rng(seed)
    log_MK = rng.normal(size=(num_cells, len(form.factors))) * 3
    low, high = form.bounds(log_MK, rng.normal(size=num_cells))
    return np.clip(rng.uniform(low, high, (num_vectors, len(low))), None, 2.0), log_MK


def naive_log_loss(form: Form, theta: list[float], place: list[float]) -> float:
    if isinstance(form, PowerLaw):
        terms = theta[: len(theta) - len(place)]
        loss = math.exp(terms[0]) if form.has_floor else 0.0
        for k, log_x in enumerate(place):
            loss += math.exp(terms[form.has_floor + k] - theta[len(terms) + k] * log_x)
        return math.log(loss)
    # Two straight lines whose slope changes as a logistic function of log x: integrated in small steps from the centre.
    level, below, above, log_break = theta
    total, steps = 0.0, 20_000
    for i in range(steps):
        z = (place[0] * (i + 0.5) / steps - log_break) / BREAK_WIDTH
        total -= (below + (above - below) * 0.5 * (1 + math.tanh(z / 2))) * place[0] / steps
    beyond = BREAK_WIDTH * math.log1p(math.exp(-log_break / BREAK_WIDTH)) if log_break > -20 else -log_break
    return level + (below - above) * beyond + total


@forms
def test_log_loss_is_that_of_the_formula(form: Form) -> None:
    theta_RP, log_MK = draw(form, 0)
    log_loss_RM, _ = form.log_loss(theta_RP, log_MK)
    expected = [[naive_log_loss(form, theta, place) for place in log_MK.tolist()] for theta in theta_RP.tolist()]
    assert log_loss_RM == pytest.approx(np.array(expected), abs=1e-6)


@forms
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_jacobian_is_the_slope(form: Form, seed: int) -> None:
    theta_RP, log_MK = draw(form, seed)
    jacobian_RMP = form.log_loss(theta_RP, log_MK)[1]
    for p in range(form.num_parameters):
        step_P = 1e-6 * np.eye(form.num_parameters)[p]
        ahead, behind = (form.log_loss(theta_RP + sign * step_P, log_MK)[0] for sign in (1, -1))
        assert jacobian_RMP[:, :, p] == pytest.approx((ahead - behind) / 2e-6, abs=1e-6)


@forms
def test_gradients_of_quantities_are_their_slopes(form: Form) -> None:
    theta_RP, _ = draw(form, 1)
    for quantity in form.quantities(np.arange(1.0, 1 + len(form.factors))):
        gradient_RP = quantity.at(theta_RP)[1]
        for p in range(form.num_parameters):
            step_P = 1e-7 * np.eye(form.num_parameters)[p]
            slope_R = (quantity.at(theta_RP + step_P)[0] - quantity.at(theta_RP - step_P)[0]) / 2e-7
            assert gradient_RP[:, p] == pytest.approx(slope_R, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("has_floor", [True, False])
def test_reported_constants_are_those_of_the_law_at_uncentred_factors(has_floor: bool) -> None:
    form = PowerLaw(("N", "D"), has_floor)
    theta_RP, log_MK = draw(form, 2, num_vectors=1)
    centre_K = np.array([12.0, 20.0])
    said = {q.name: q.to_reported(float(q.at(theta_RP)[0][0])) for q in form.quantities(centre_K)}
    n, d = np.exp(log_MK + centre_K).T
    loss = said.get("irreducible_loss", 0.0) + said["coefficient_N"] * n ** -said["exponent_N"]
    loss += said["coefficient_D"] * d ** -said["exponent_D"]
    assert np.log(loss) == pytest.approx(form.log_loss(theta_RP, log_MK)[0][0])


def test_compute_exponents_are_those_of_the_best_split_of_compute() -> None:
    form, theta_1P = PowerLaw(("N", "D", "S")), np.array([[0.1, 1.0, 0.5, 0.2, 0.3, 0.5, 0.8]])

    def best_split(log_compute: float) -> np.ndarray:
        def loss(log_nd: np.ndarray) -> float:
            return form.log_loss(theta_1P, np.array([[*log_nd, log_compute - log_nd.sum()]]))[0][0, 0]

        found = minimize(loss, np.full(2, log_compute / 3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 0})
        return np.append(found.x, log_compute - found.x.sum())

    slopes = best_split(2.0) - best_split(1.0)
    said = [q.to_reported(float(q.at(theta_1P)[0][0])) for q in form.quantities(np.zeros(3)) if "compute" in q.name]
    assert said == pytest.approx(slopes.tolist(), abs=1e-4)
    assert sum(said) == pytest.approx(1)


def test_a_broken_law_has_one_exponent_on_either_side() -> None:
    form, theta_1P = BrokenPowerLaw("C"), np.array([[0.0, 0.4, 0.1, 1.0]])
    log_M1 = np.array([[-4.0], [-3.0], [5.0], [6.0]])
    first, second, third, last = form.log_loss(theta_1P, log_M1)[0][0]
    assert first - second == pytest.approx(0.4, abs=1e-6)
    assert third - last == pytest.approx(0.1, abs=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_linear_problems_without_outliers_are_least_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns_RMT, target_M = rng.normal(size=(4, 9, 3)), rng.normal(size=9)
    free_RT = solve_linear(columns_RMT, target_M, 1e6, non_negative=False)
    for columns_MT, free_T in zip(columns_RMT, free_RT, strict=True):
        assert free_T == pytest.approx(np.linalg.lstsq(columns_MT, target_M)[0], abs=1e-6)


def test_linear_problems_keep_to_positive_terms() -> None:
    rng = np.random.default_rng(0)
    columns_RMT = np.abs(rng.normal(size=(50, 9, 3)))
    target_M = np.abs(rng.normal(size=9))
    found_RT = solve_linear(columns_RMT, target_M, 1e6, non_negative=True)
    same = 0
    for columns_MT, found_T in zip(columns_RMT, found_RT, strict=True):
        best_T, error = nnls(columns_MT, target_M)
        assert found_T.min() >= 0
        own = np.linalg.norm(target_M - columns_MT @ found_T)
        assert own >= error - 1e-8
        same += np.allclose(found_T, best_T, atol=1e-6)
    assert same > 40  # dropping negative terms is not quite the active-set method, and the polish does the rest
