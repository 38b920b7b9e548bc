import numpy as np
import pytest
from scipy.stats import spearmanr

from userrep.scaling.correlation import rank_correlation


def test_it_is_spearmans_with_ties() -> None:
    rng = np.random.default_rng(0)
    x_M = np.round(rng.standard_normal(40), 1)
    y_M = x_M + rng.standard_normal(40)
    found = rank_correlation("x", x_M, y_M, num_resamples=400, seed=0)
    assert found.value == pytest.approx(float(spearmanr(x_M, y_M).statistic))
    assert found.low < found.value < found.high
    # Fisher's interval with the standard error of Bonett and Wright (2000) for ranks
    width = 1.96 * np.sqrt((1 + found.value**2 / 2) / 37)
    ends = np.tanh(np.arctanh(found.value) + width * np.array([-1, 1]))
    assert [found.low, found.high] == pytest.approx(ends, abs=0.08)


def test_too_few_places_noise_and_constants_are_refused() -> None:
    rng = np.random.default_rng(1)
    few = rank_correlation("x", np.arange(5.0), np.arange(5.0), num_resamples=50, seed=0)
    assert few.refusals == ("5 places have both, of at least 8",)
    constant = rank_correlation("x", np.arange(9.0), np.ones(9), num_resamples=50, seed=0)
    assert constant.refusals == ("one of the two is the same everywhere",)
    noise = rank_correlation("x", rng.standard_normal(9), rng.standard_normal(9), num_resamples=200, seed=0)
    assert "is wider than 1" in noise.refusals[0]
