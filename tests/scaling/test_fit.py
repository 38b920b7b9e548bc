import itertools
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from userrep.scaling.broken import BrokenPowerLaw
from userrep.scaling.cells import Cells
from userrep.scaling.fit import Estimate, fit_law
from userrep.scaling.forms import Form, PowerLaw

PUBLISHED = {
    # arXiv 2404.10102, for the cells of arXiv 2203.15556
    "irreducible_loss": 1.817,
    "coefficient_N": 482.0,
    "coefficient_D": 2085.0,
    "exponent_N": 0.348,
    "exponent_D": 0.366,
}
JOINT = PowerLaw(("N", "D"))
ONE = PowerLaw(("C",))


def chinchilla_cells(noise: float, seed: int = 0) -> Cells:
    n, d = np.array(list(itertools.product(np.logspace(7, 10, 5), np.logspace(8.5, 12, 5)))).T
    loss = 1.817 + 482 * n**-0.348 + 2085 * d**-0.366
    noise_M = np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))
    return Cells({"N": n, "D": d}, loss * noise_M, 6 * n * d)


def one_factor(c: np.ndarray, noise: float = 0.0, seed: int = 0) -> Cells:
    loss = 0.6 + 30 * (c / 1e9) ** -0.3
    return Cells({"C": c}, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(c))))


def test_published_constants_are_recovered() -> None:
    estimates = fit_law(JOINT, chinchilla_cells(0.0), num_resamples=50).estimates
    for name, value in PUBLISHED.items():
        assert estimates[name].value == pytest.approx(value, rel=1e-6)
    assert estimates["compute_exponent_N"].value == pytest.approx(0.366 / (0.348 + 0.366))
    assert all(estimate.is_stated for estimate in estimates.values())


def test_published_constants_are_within_the_intervals_under_noise() -> None:
    # Nine independent sweeps of one exponent each: the chance of more than two misses of a 95% interval is 0.8%.
    fits = [fit_law(JOINT, chinchilla_cells(0.01, seed), num_resamples=200) for seed in range(9)]
    for name, value in PUBLISHED.items():
        found = [fit.estimates[name] for fit in fits]
        assert sum(not one.low <= value <= one.high for one in found) <= 2
        assert all(one.low < one.value < one.high for one in found)
    assert np.mean([fit.noise for fit in fits]) == pytest.approx(0.01, rel=0.15)
    assert min(fit.r_squared for fit in fits) > 0.99


def test_least_squares_of_a_straight_line_has_the_intervals_of_textbooks() -> None:
    # Without floor and with a wide Huber loss, a law in one factor is a line in logarithms, under normal noise.
    c = np.logspace(12, 15, 12)
    noise = 1e-3 * np.random.default_rng(3).standard_normal(len(c))
    cells = Cells({"C": c}, 5 * c**-0.2 * np.exp(noise))
    fit = fit_law(PowerLaw(("C",), has_floor=False), cells, delta=10.0, num_resamples=4000)
    line = stats.linregress(np.log(c), np.log(cells.loss))
    t = stats.t.ppf(0.975, len(c) - 2)
    found = fit.estimates["exponent_C"]
    assert found.value == pytest.approx(-line.slope, rel=1e-6)
    assert found.high - found.low == pytest.approx(2 * t * line.stderr, rel=0.15)
    # A cell a decade beyond: the variance of the line there, and its own.
    x = np.log(c)
    left = np.log(cells.loss) - line.intercept - line.slope * x
    variance = (left**2).sum() / (len(c) - 2)
    leverage = 1 / len(c) + (math.log(1e16) - x.mean()) ** 2 / ((x - x.mean()) ** 2).sum()
    for of_cell in (False, True):
        low, high = fit.intervals({"C": np.array([1e16])}, of_cell=of_cell)
        expected = 2 * t * math.sqrt(variance * (of_cell + leverage))
        assert np.log(high / low)[0] == pytest.approx(expected, rel=0.15)


def test_intervals_of_few_cells_are_wider_than_percentiles() -> None:
    fit = fit_law(ONE, one_factor(np.logspace(12, 15, 6), noise=0.01))
    found = fit.estimates["exponent_C"]
    low, high = np.quantile(fit.resampled[:, 2], [0.025, 0.975])
    assert found.high - found.low > 1.15 * (high - low)


def test_one_ruined_cell_hardly_moves_the_law() -> None:
    cells = chinchilla_cells(0.002)
    ruined = replace(cells, loss=cells.loss * np.where(np.arange(len(cells)) == 7, 1.5, 1.0))
    before, after, squares = (
        fit_law(JOINT, some, num_resamples=50, delta=delta).estimates["exponent_N"].value
        for some, delta in ((cells, 1e-3), (ruined, 1e-3), (ruined, 10.0))
    )
    assert abs(after / before - 1) < 0.03 < abs(squares / before - 1)


def test_units_of_factors_do_not_matter() -> None:
    cells = chinchilla_cells(0.01)
    scaled = Cells({"N": cells.factors["N"] / 1e6, "D": cells.factors["D"]}, cells.loss)
    one, other = (fit_law(JOINT, some, num_resamples=100).estimates for some in (cells, scaled))
    for name in ("exponent_N", "exponent_D", "irreducible_loss"):
        for end in ("value", "low", "high"):
            assert getattr(other[name], end) == pytest.approx(getattr(one[name], end), rel=1e-4)
    alpha = one["exponent_N"].value
    assert other["coefficient_N"].value == pytest.approx(one["coefficient_N"].value * 1e6**-alpha, rel=1e-3)


def test_the_seed_decides_the_resamples_and_nothing_else() -> None:
    cells = chinchilla_cells(0.01)
    one, same, other = (fit_law(JOINT, cells, num_resamples=100, seed=seed).estimates for seed in (0, 0, 1))
    assert one == same
    assert one["exponent_N"].value == other["exponent_N"].value
    assert one["exponent_N"].low != other["exponent_N"].low


def test_the_band_of_the_law_lies_within_the_interval_of_a_cell() -> None:
    fit = fit_law(JOINT, chinchilla_cells(0.01), num_resamples=400)
    places = {"N": np.array([1e8, 1e11]), "D": np.array([1e10, 1e13])}
    (low, high), (cell_low, cell_high) = (fit.intervals(places, of_cell=of_cell) for of_cell in (False, True))
    assert (cell_low < low).all()
    assert (low < fit.predict(places)).all()
    assert (fit.predict(places) < high).all()
    assert (high < cell_high).all()
    assert high[1] / low[1] > high[0] / low[0]  # beyond the cells less is known


@pytest.mark.parametrize(
    ("cells", "form", "reason"),
    [
        (one_factor(np.logspace(12, 12.9, 12)), ONE, "C spans 0.90 decades, of at least 1"),
        (
            replace(one_factor(np.logspace(12, 15, 12)), compute=np.geomspace(1, 9, 12)),
            ONE,
            "compute spans 0.95 decades",
        ),
        (one_factor(np.logspace(12, 15, 8), noise=0.1), ONE, r"95% interval .* times the value wide, of at most 0.5"),
        (
            Cells({"C": np.logspace(1, 3, 9)}, np.logspace(1, 3, 9) ** 0.1),
            PowerLaw(("C",), has_floor=False),
            "an end of the range that is searched",
        ),
    ],
)
def test_an_exponent_that_is_not_known_is_not_stated(cells: Cells, form: Form, reason: str) -> None:
    (found,) = [one for one in fit_law(form, cells, num_resamples=200).estimates.values() if "exponent" in one.name]
    assert not found.is_stated
    assert str(found).startswith("exponent_C is not stated: ")
    (said,) = [refusal for refusal in found.refusals if re.search(reason, refusal)]
    assert said in str(found)
    assert f"= {found.value:.4g}" not in str(found)


def test_one_cell_more_than_parameters_states_nothing() -> None:
    found = fit_law(ONE, one_factor(np.logspace(12, 15, 4), noise=0.01), num_resamples=200).estimates["exponent_C"]
    assert not found.is_stated
    assert len(str(found)) < 200


def test_exactly_one_decade_is_enough() -> None:
    found = fit_law(ONE, one_factor(np.logspace(11, 12, 12)), num_resamples=50).estimates["exponent_C"]
    assert found.is_stated
    assert str(found).startswith("exponent_C = 0.3 (95% interval")


def test_how_compute_is_divided_rests_on_the_range_of_every_factor() -> None:
    cells = chinchilla_cells(0.0)
    squeezed = Cells({"N": cells.factors["N"], "D": cells.factors["D"] ** 0.25}, cells.loss)  # 3.5 decades become 0.875
    estimates = fit_law(JOINT, squeezed, num_resamples=50).estimates
    assert estimates["exponent_N"].is_stated
    for name in ("exponent_D", "compute_exponent_N", "compute_exponent_D"):
        assert any("D spans 0.8" in refusal for refusal in estimates[name].refusals)


def test_an_estimate_says_its_interval() -> None:
    assert str(Estimate("exponent_N", 0.348, 0.3, 0.4)) == "exponent_N = 0.348 (95% interval 0.3 to 0.4)"


@pytest.mark.parametrize(
    ("form", "cells", "message"),
    [
        (ONE, one_factor(np.logspace(12, 15, 3)), "3 cells for the 3 parameters .* at least 4"),
        (ONE, one_factor(np.repeat([1e12, 1e13], 4), noise=0.01), "C has 2 different values: .* needs at least 3"),
        (BrokenPowerLaw("C"), one_factor(np.repeat([1e12, 1e13, 1e14], 3)), "C has 3 different values"),
        (JOINT, one_factor(np.logspace(12, 15, 9)), r"factors \['C'\], and the law needs \['N', 'D'\]"),
        (ONE, Cells({"C": np.logspace(1, 3, 9)}, np.full(9, 2.0)), "all 9 cells have the loss 2"),
    ],
)
def test_cells_that_determine_nothing_are_refused(form: Form, cells: Cells, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_law(form, cells)


def test_a_change_between_places_is_that_of_the_law() -> None:
    c = np.logspace(10, 13, 9)
    fit = fit_law(ONE, one_factor(c, 0.01, seed=2), num_resamples=200)
    start, end = {"C": 1e11}, {"C": 2e11}
    found = fit.change("change", start, end)
    at = {"C": np.array([1e11, 2e11])}
    predicted, truth = fit.predict(at), one_factor(at["C"]).loss
    assert found.value == pytest.approx(math.log(predicted[1] / predicted[0]))
    assert found.low < math.log(truth[1] / truth[0]) < found.high
    assert found.is_stated
    # The two losses share most of their error, so their ratio is known better than either.
    low_M, high_M = fit.intervals(at, of_cell=False)
    assert found.high - found.low < math.log(high_M[0] / low_M[0])
