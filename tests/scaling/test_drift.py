from dataclasses import replace

from tests.support.runs_table import NUM_RESAMPLES, Planted, star_laws, star_runs, take
from userrep.scaling.drift import DOUBLING, compare_laws
from userrep.scaling.laws import fit_laws


def test_equal_laws_with_other_noise_have_not_drifted() -> None:
    drift = compare_laws(star_laws(), star_laws(2))
    compared = [change for change in drift.changes if change.difference is not None]
    assert len(compared) >= 10
    assert len(drift.drifted) <= 1  # 95% intervals: one of a dozen may
    assert drift.center is not None
    assert drift.center.law == "L(N, D)"
    assert drift.center.is_inside
    assert "inside" in str(drift)


def test_the_same_sweep_has_no_difference_at_all() -> None:
    drift = compare_laws(star_laws(), star_laws())
    assert all(change.difference.value == 0 for change in drift.changes if change.difference is not None)
    assert not drift.drifted
    assert str(drift).startswith("No drift seen against planted")


def test_a_planted_drift_is_flagged_where_it_is() -> None:
    exponents = Planted().exponents | {"D": 0.75}
    later = fit_laws(star_runs(Planted(exponents=exponents, seed=4)), num_resamples=NUM_RESAMPLES)
    drift = compare_laws(star_laws(), later)
    flagged = {(change.law, change.name) for change in drift.drifted}
    assert {("L(N, D)", "exponent_D"), ("L(D)", DOUBLING)} <= flagged
    assert not {("L(N, D)", "exponent_N"), ("L(N)", DOUBLING)} & flagged
    assert "L(N, D) exponent_D" in str(drift)


def test_a_center_cell_beyond_the_forecast_is_seen() -> None:
    center = star_laws().center_place
    assert center is not None
    worse = replace(center, loss=1.1 * center.loss)
    places = tuple(worse if place is center else place for place in star_laws().places)
    drift = compare_laws(star_laws(), replace(star_laws(), places=places))
    assert drift.center is not None
    assert drift.center.measured == worse.loss
    assert not drift.center.is_inside
    assert "outside" in str(drift)


def test_other_pools_and_missing_laws_cannot_be_compared() -> None:
    later = replace(star_laws(), facts=replace(star_laws().facts, pool_size=512))
    drift = compare_laws(star_laws(), later)
    assert all(change.difference is None for change in drift.changes)
    assert "among 4096 users then and 512 now" in str(drift)
    nothing = fit_laws(take(star_runs(), 0))
    for pair in ((star_laws(), nothing), (nothing, star_laws()), (nothing, nothing)):
        drift = compare_laws(*pair)
        assert drift.center is None
        assert not drift.drifted
        assert all(change.refusal for change in drift.changes)
        assert str(drift).startswith("Nothing can be compared with planted.")


def test_a_center_that_moved_is_forecast_by_a_law_that_has_the_factor() -> None:
    moved = next(place for place in star_laws().places if place.factors["S"] == 64)
    drift = compare_laws(star_laws(), replace(star_laws(), center=moved.cell_id))
    assert drift.center is not None
    assert drift.center.law == "L(S)"
    both = replace(moved, cell_id="both", factors=moved.factors | {"B": 64.0})
    later = replace(star_laws(), center="both", places=(*star_laws().places, both))
    assert "no law of the earlier sweep has all of ['B', 'S']" in str(compare_laws(star_laws(), later).center_refusal)
