import numpy as np
import pytest

from benchmarks.scaling_fit import Study, approach_2, isoflop, many_starts, run_study, surfaces
from userrep.scaling.cells import Cells

EXPONENTS = ("exponent_N", "exponent_D")


def test_designs_are_as_they_say() -> None:
    for name, surface in surfaces().items():
        places = surface.places
        assert len(places["N"]) == 25, name
        compute = places["N"] * places["D"]
        assert compute.max() / compute.min() >= 100, name
        assert surface.truth()["exponent_N"] != surface.truth()["exponent_D"]
    places = isoflop().places
    assert np.unique(np.round(np.log(places["N"] * places["D"]), 9)).size == 5


def test_approach_2_is_right_where_the_centre_is_and_both_exponents_are_the_same() -> None:
    # L is then an even function about the best size in log N, so the parabola has its lowest point.
    budget_M = np.repeat(np.logspace(9, 13, 5), 5)
    n = np.sqrt(budget_M / 6) * np.tile(np.geomspace(1 / 5, 5, 5), 5)
    d = budget_M / 6 / n
    assert approach_2(Cells({"N": n, "D": d}, 1 + n**-0.3 + d**-0.3)) == pytest.approx(0.5)


def test_a_study_counts_trials() -> None:
    study = run_study(surfaces()["star"], num_trials=3, num_resamples=60)
    for name in (*EXPONENTS, "compute_exponent_N", "irreducible_loss", "forecast"):
        assert len(study.values[name]) == len(study.hits[name]) == len(study.percentile_hits[name]) == 3
        assert np.abs(np.array(study.values[name]) - 1).max() < 0.5
        assert min(study.widths[name]) > 0
    assert len(study.fit_s) == len(study.point_s) == 3


def test_many_starts_find_what_there_is_to_find() -> None:
    surface = surfaces()["rectangle"]
    assert many_starts(Cells(surface.places, surface.loss(surface.places)), num_starts=5) < 1e-6


@pytest.mark.slow
def test_exponents_are_unbiased_and_their_intervals_hold() -> None:
    studies: list[Study] = [run_study(surface, num_trials=200, num_resamples=1000) for surface in surfaces().values()]
    for study in studies:
        for name in EXPONENTS:
            assert abs(np.mean(study.values[name]) - 1) <= 0.02
            # 200 trials tell coverage to +-1.5 points: of one exponent, four of those; the bar is held by all together.
            assert np.mean(study.hits[name]) >= 0.89
    # 1,200 intervals: +-0.6 points.
    assert 0.93 <= np.mean([hit for study in studies for name in EXPONENTS for hit in study.hits[name]]) <= 0.97
    assert 0.92 <= np.mean([hit for study in studies for hit in study.hits["forecast"]]) <= 0.98
