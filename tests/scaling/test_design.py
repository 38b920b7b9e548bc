import math

import numpy as np
import pytest

from userrep.scaling.cells import Cells
from userrep.scaling.design import next_cells
from userrep.scaling.fit import Fit, fit_law
from userrep.scaling.forms import PowerLaw

CANDIDATES = {"N": np.array([1e4, 1e5, 1e6, 1e7, 1e8]), "D": np.array([1e8, 1e5, 1e6, 1e9, 1e5])}


def joint_fit() -> Fit:
    n, d = (axis.ravel() for axis in np.meshgrid(np.logspace(4, 6.5, 4), np.logspace(5, 7.5, 4)))
    loss = 0.5 + 30 * n**-0.35 + 60 * d**-0.28
    return fit_law(PowerLaw(("N", "D")), Cells({"N": n, "D": d}, loss), num_resamples=50)


def slopes(n: np.ndarray, d: np.ndarray) -> np.ndarray:
    """Of log loss in E, A, B, alpha and beta at the truth of `joint_fit`, by differences."""
    truth = [0.5, 30.0, 60.0, 0.35, 0.28]

    def log_loss(e: float, a: float, b: float, alpha: float, beta: float) -> np.ndarray:
        return np.log(e + a * n**-alpha + b * d**-beta)

    columns = []
    for p, value in enumerate(truth):
        ahead, behind = ([*truth[:p], value * (1 + sign * 1e-5), *truth[p + 1 :]] for sign in (1, -1))
        columns.append((log_loss(*ahead) - log_loss(*behind)) / (2e-5 * value))
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("target", ["exponent_N", "exponent_D"])
def test_the_cut_is_that_of_a_sweep_with_the_cell(target: str) -> None:
    fit = joint_fit()
    place = 3 if target == "exponent_N" else 4

    def variance(n: np.ndarray, d: np.ndarray) -> float:
        jacobian = slopes(n, d)
        scale = np.sqrt((jacobian**2).sum(axis=0))
        return (np.linalg.inv(jacobian.T @ jacobian / np.outer(scale, scale)) / np.outer(scale, scale))[place, place]

    n, d = fit.cells.factors["N"], fit.cells.factors["D"]
    before = variance(n, d)
    found = next_cells(fit, CANDIDATES, target=target)
    assert len(found) == 5
    for one in found:
        i = one.candidate
        after = variance(np.append(n, CANDIDATES["N"][i]), np.append(d, CANDIDATES["D"][i]))
        assert one.factors == {"N": CANDIDATES["N"][i], "D": CANDIDATES["D"][i]}
        assert one.variance_cut == pytest.approx(1 - after / before, rel=1e-3, abs=1e-5)
        assert one.width_cut == pytest.approx(1 - math.sqrt(after / before), rel=1e-3, abs=1e-5)
    assert [one.variance_cut for one in found] == sorted((one.variance_cut for one in found), reverse=True)


def test_a_slope_is_best_known_from_far_away() -> None:
    c = np.logspace(3, 6, 8)
    fit = fit_law(PowerLaw(("C",), has_floor=False), Cells({"C": c}, 3 * c**-0.2), num_resamples=50)
    found = next_cells(fit, {"C": np.array([1e4, 1e5, 1e7, 1e8])})
    assert [one.candidate for one in found] == [3, 2, 0, 1] or [one.candidate for one in found] == [3, 2, 1, 0]
    # Least squares: the variance of a slope is one over the sum of squared distances to the mean.
    before, after = (((x - x.mean()) ** 2).sum() for x in (np.log(c), np.log(np.append(c, 1e8))))
    assert found[0].variance_cut == pytest.approx(1 - before / after)
    assert found[0].target == "exponent_C"


def test_costs_count() -> None:
    fit = joint_fit()
    cost_M = CANDIDATES["N"] * CANDIDATES["D"]
    found = next_cells(fit, CANDIDATES, target="exponent_N", cost_M=cost_M)
    cuts = {one.candidate: one.variance_cut for one in next_cells(fit, CANDIDATES, target="exponent_N")}
    for one in found:
        assert one.variance_cut == cuts[one.candidate]
        assert one.cut_per_cost == pytest.approx(one.variance_cut / cost_M[one.candidate])
    assert found[0].cut_per_cost == max(one.cut_per_cost for one in found)
    with pytest.raises(ValueError, match=r"costs of shape \(2,\) for 5 candidates"):
        next_cells(fit, CANDIDATES, cost_M=np.ones(2))


def test_a_forecast_is_known_best_from_a_cell_at_its_place() -> None:
    found = next_cells(joint_fit(), CANDIDATES, target={"N": 1e7, "D": 1e9})
    assert found[0].factors == {"N": 1e7, "D": 1e9}
    assert found[0].target == "loss at N=1e+07, D=1e+09"


def test_the_target_is_the_exponent_that_is_known_worst_or_the_one_asked_for() -> None:
    fit = joint_fit()
    widths = {
        name: (one.high - one.low) / one.value
        for name, one in fit.estimates.items()
        if name.split("_")[0] in ("exponent", "compute")
    }
    assert next_cells(fit, CANDIDATES)[0].target == max(widths, key=lambda name: widths[name])
    with pytest.raises(ValueError, match="'exponent_S' is not an exponent of a power law in N, D with floor: one of"):
        next_cells(fit, CANDIDATES, target="exponent_S")
