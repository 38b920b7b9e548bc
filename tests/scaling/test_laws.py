import json
import math
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.runs_table import (
    CENTER,
    NUM_RESAMPLES,
    Planted,
    isoflop_runs,
    ladder_runs,
    star_laws,
    star_runs,
    take,
)
from userrep.scaling.laws import LAW_NAMES, fit_laws, frontier
from userrep.scaling.records import Laws
from userrep.scaling.runs import read_runs

PLANTED = Planted()


def fit(table: pa.Table) -> Laws:
    return fit_laws(table, num_resamples=NUM_RESAMPLES)


def test_planted_exponents_are_inside_their_intervals() -> None:
    found = [
        (star_laws().law(f"L({name})").with_floor.estimate(f"exponent_{name}"), exponent)
        for name, exponent in PLANTED.exponents.items()
    ]
    joint = star_laws().law("L(N, D)").with_floor
    found += [(joint.estimate(f"exponent_{name}"), PLANTED.exponents[name]) for name in "ND"]
    inside = [estimate is not None and estimate.low <= exponent <= estimate.high for estimate, exponent in found]
    assert sum(inside) >= 5  # of 6 intervals of 95%, two miss with a chance of 3%
    for name, terms in PLANTED.terms.items():  # the floor of an arm is all but its own term
        floor = star_laws().law(f"L({name})").with_floor.estimate("irreducible_loss")
        assert floor is not None
        assert floor.low <= PLANTED.loss(CENTER) - terms <= floor.high


def test_compute_law_of_a_ladder_is_recovered() -> None:
    laws = fit(ladder_runs(exponent=0.25, floor=1.5))
    law = laws.law("L(C)")
    exponent, floor = law.with_floor.estimate("exponent_C"), law.with_floor.estimate("irreducible_loss")
    assert exponent is not None
    assert floor is not None
    assert exponent.is_stated
    assert exponent.low <= 0.25 <= exponent.high
    assert floor.low <= 1.5 <= floor.high
    assert law.scores[0].form == "power law in C with floor"
    # N and D grow together: what either does cannot be told.
    assert "correlation 1.000" in str(laws.law("L(N, D)").refusal)
    assert "no finished center cell" in str(laws.law("L(N)").refusal)


def test_exponents_of_isoflop_cells_are_recovered() -> None:
    law = fit(isoflop_runs()).law("L(N, D)")
    for name in "ND":
        estimate = law.with_floor.estimate(f"exponent_{name}")
        assert estimate is not None
        assert estimate.is_stated
        assert estimate.low <= PLANTED.exponents[name] <= estimate.high


def test_a_doubling_is_what_the_planted_law_says() -> None:
    for name in "NDSB":
        doubling = star_laws().law(f"L({name})").doubling
        assert doubling is not None
        truth = math.log(PLANTED.loss(CENTER | {name: 2 * CENTER[name]}) / PLANTED.loss(CENTER))
        assert doubling.factor_change.low <= truth <= doubling.factor_change.high
        share = PLANTED.terms[name] / PLANTED.loss(CENTER)
        if name == "B":
            assert doubling.slope is None  # batch costs no compute
        else:
            assert doubling.elasticity == pytest.approx(1)
            assert doubling.slope is not None
            assert doubling.slope.low <= -PLANTED.exponents[name] * share <= doubling.slope.high
            assert doubling.compute_change is not None
            assert doubling.compute_change.value == pytest.approx(doubling.factor_change.value, rel=1e-6)


def test_every_law_has_its_tests() -> None:
    for law in star_laws().laws:
        assert [len(law.residuals), len({one.cell for one in law.residuals})] == [len(law.cell_ids)] * 2
        assert len(law.forecasts) == min(3, round(0.2 * len(law.cell_ids)))
        assert len(law.scores) == (2 if law.name == "L(N, D)" else 3)
        assert len(law.band) == (0 if law.name == "L(N, D)" else 48)
        assert all(point.low < point.loss < point.high for point in law.band)


def test_the_largest_cells_are_forecast_within_their_intervals() -> None:
    law = star_laws().law("L(N, D)")
    computes = sorted((place.compute for place in star_laws().places), reverse=True)[: len(law.forecasts)]
    held = [star_laws().place(law.cell_ids[one.cell]).compute for one in law.forecasts]
    assert sorted(held, reverse=True) == computes
    assert all(one.is_inside for one in law.forecasts)


def test_next_cells_have_the_price_of_the_generator() -> None:
    steps = [step for law in star_laws().laws for step in law.next_steps]
    assert {step.rule for step in steps} == {"exponent", "forecast"}
    highest = star_laws().places[-1].compute
    for step in steps:
        assert 0 < step.width_cut < 1
        assert step.flops <= 4 * highest
        assert step.hours == pytest.approx(step.flops / 2e12 / 3600)
        if "N" in step.factors:
            n, d, s = (step.factors[name] for name in "NDS")
            assert step.flops == pytest.approx(6 * n * d * s * 8, rel=1e-6)


@pytest.mark.parametrize("num_finished", [0, 3, 6])
def test_too_few_cells_are_refused_and_not_an_error(num_finished: int) -> None:
    laws = fit(take(star_runs(), num_finished))
    assert tuple(law.name for law in laws.laws) == LAW_NAMES
    fitted = [law.name for law in laws.laws if law.refusal is None]
    assert fitted == (["L(C)", "L(N)"] if num_finished == 6 else [])
    for law in laws.laws:
        assert law.refusal is None or law.refusal == law.forecast_refusal
    if num_finished == 3:
        assert laws.law("L(N)").refusal == "L(N) has 3 finished cells, and a power law with floor needs at least 5"
    if num_finished:
        assert "no finished cells of the arm batch" in str(laws.law("L(B)").refusal)


def test_the_frontier_has_no_cell_that_another_beats() -> None:
    # A longer history is more to go by, so only those of the center's length are compared.
    places = [place for place in star_laws().places if place.factors["S"] == CENTER["S"]]
    front = frontier(places)
    assert [place.cell_id for place in front] == list(star_laws().frontier)
    losses = [place.loss for place in front]
    assert losses == sorted(losses, reverse=True)
    for place in places:
        cheaper = [other.loss for other in places if other.compute < 1.01 * place.compute]
        assert place not in front or place.loss == min(cheaper)
        assert any(one.compute <= 1.06 * place.compute and one.loss <= place.loss for one in front)


def test_a_loss_that_rises_along_an_arm_is_told_and_not_fitted() -> None:
    planted = Planted(
        terms={"N": 0.9, "D": 0.9, "S": 0.45, "B": 0.2}, exponents={"N": 0.4, "D": 0.35, "S": 0.6, "B": -0.3}
    )
    laws = fit_laws(star_runs(planted), num_resamples=20)
    refusal = laws.law("L(B)").refusal
    assert refusal is not None
    assert refusal.startswith("the loss does not fall with B: it is ")
    assert "at 32 and" in refusal
    assert laws.law("L(B)").doubling is None
    assert laws.law("L(N)").refusal is None


def test_a_budget_has_one_cell_on_the_frontier() -> None:
    _, places = read_runs(isoflop_runs())
    assert len(frontier(places)) == 4


def test_json_form_is_the_same_laws_and_fits_again(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    for laws in (star_laws(), fit(take(star_runs(), 0))):
        laws.save(path)
        assert Laws.load(path) == laws
    star_laws().save(path)
    law = Laws.load(path).law("L(N, D)")
    again = law.refit(NUM_RESAMPLES, 0).estimates["exponent_N"]
    assert again == law.with_floor.estimate("exponent_N")
    with pytest.raises(ValueError, match="L\\(N\\) was not fitted"):
        fit(take(star_runs(), 3)).law("L(N)").refit(10, 0)


def test_a_file_that_is_no_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    path.write_text('{"version": 1}')
    with pytest.raises(ValueError, match=r"is not the fit\.json of a sweep \(at 'facts'"):
        Laws.load(path)
    star_laws().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99}))
    with pytest.raises(ValueError, match="has version 99, and this package reads 1"):
        Laws.load(path)
