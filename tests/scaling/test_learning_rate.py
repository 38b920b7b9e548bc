"""The rule is recovered from runs whose best rates are known."""

import math
from dataclasses import replace

import numpy as np
import pytest

from userrep.scaling.ladder import make_rung
from userrep.scaling.learning_rate import RateTrial, find_optimum, fit_rate_rule
from userrep.scaling.rules import LadderConfig, PowerRule, RateRule

PLANTED = RateRule(
    matrices=PowerRule(value=3e-3, width_exponent=-0.8, batch_exponent=0.6),
    embeddings=PowerRule(value=2e-2, width_exponent=0.1, batch_exponent=0.4),
)
WIDTHS, BATCHES, FACTORS = (32, 64, 128), (128, 512, 2048), (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


def trials(noise: float, seed: int = 0, offset: float = 1.3) -> list[RateTrial]:
    """Runs around rates that are `offset` times the best ones; from eight times the best one on, they diverge."""
    rng, found = np.random.default_rng(seed), []
    for dim in WIDTHS:
        for batch in BATCHES:
            best = [PLANTED.at(rule, dim, batch) for rule in (PLANTED.matrices, PLANTED.embeddings)]
            for factor in FACTORS:
                distance = math.log(offset * factor)
                loss = 2 + 8 / dim + 0.1 * distance**2 + noise * rng.standard_normal()
                rates = [offset * factor * rate for rate in best]
                found.append(RateTrial(dim, batch, *rates, math.nan if offset * factor > 8 else loss))
    return found


def test_planted_exponents_are_recovered_exactly_without_noise() -> None:
    fit = fit_rate_rule(trials(noise=0), LadderConfig().rate, "a record")
    for found, planted in ((fit.rule.matrices, PLANTED.matrices), (fit.rule.embeddings, PLANTED.embeddings)):
        assert found.value == pytest.approx(planted.value, rel=1e-9)
        assert found.width_exponent == pytest.approx(planted.width_exponent, abs=1e-9)
        assert found.batch_exponent == pytest.approx(planted.batch_exponent, abs=1e-9)
    assert fit.worst_factor == pytest.approx(1, abs=1e-9)
    assert len(fit.optima) == 9


def test_noise_moves_the_exponents_by_what_it_must() -> None:
    fits = [fit_rate_rule(trials(noise=0.005, seed=seed), LadderConfig().rate, "").rule for seed in range(40)]
    widths = np.array([fit.matrices.width_exponent for fit in fits])
    # Least squares through five points an octave apart, noise s = .005, curvature c = .1: the slope is known to
    # s / (log(2) sqrt(10)), c to s / (log(2)^2 sqrt(14)), so an optimum half an octave off the middle to .015. Nine of
    # them over three widths an octave apart: .015 / (log(2) sqrt(6)) = .009. Twice that is beyond the luck of 40 fits.
    assert widths.std() < 0.018
    assert abs(widths.mean() - PLANTED.matrices.width_exponent) < 3 * widths.std() / len(fits) ** 0.5 + 1e-3


def test_a_measured_rule_is_what_the_ladder_goes_by() -> None:
    rule = fit_rate_rule(trials(noise=0), LadderConfig().rate, "rates_cpu2").rule
    rung = make_rung(1e6, LadderConfig(rate=rule))
    expected = PLANTED.at(PLANTED.matrices, rung.model.dim, rung.global_batch_size)
    assert rung.learning_rate == pytest.approx(expected, rel=1e-3)
    assert "rates_cpu2" in rung.describe()


def test_the_optimum_lies_between_its_neighbours_whatever_noise_says() -> None:
    group = [
        RateTrial(8, 64, rate, rate, loss) for rate, loss in ((1, 1.0), (2, 0.999), (4, 1.0), (8, 0.9995), (16, 3))
    ]
    assert 1 <= find_optimum(group).learning_rate <= 4
    # Bent the wrong way, the parabola says nothing, and the best trial stands.
    flat = [RateTrial(8, 64, rate, rate, loss) for rate, loss in ((1, 0.2), (2, 1.0), (4, 0.19), (8, 1.0), (16, 0.2))]
    assert find_optimum(flat).learning_rate == pytest.approx(4)


@pytest.mark.parametrize("offset", [8.5, 1 / 9])
def test_a_minimum_at_the_end_is_no_minimum(offset: float) -> None:
    with pytest.raises(ValueError, match=r"width 32 and batch 128 have no minimum between .*: try more rates"):
        fit_rate_rule(trials(noise=0, offset=offset), LadderConfig().rate, "")


def test_only_diverged_runs_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="no minimum"):
        find_optimum([RateTrial(8, 64, rate, rate, math.inf) for rate in (1, 2, 3)])


def test_width_and_batch_that_move_together_are_refused() -> None:
    diagonal = [trial for trial in trials(0) if (trial.dim, trial.batch_size) in {(32, 128), (64, 512), (128, 2048)}]
    with pytest.raises(ValueError, match="cannot tell width from batch: run at least two widths at one batch"):
        fit_rate_rule(diagonal, LadderConfig().rate, "")
    with pytest.raises(ValueError, match="cannot tell width from batch"):
        fit_rate_rule([trial for trial in trials(0) if trial.batch_size == 128], LadderConfig().rate, "")


def test_rates_that_were_not_scaled_together_are_refused() -> None:
    found = trials(0)
    found[3] = replace(found[3], embedding_learning_rate=0.5)
    with pytest.raises(ValueError, match="different ratios between their two learning rates: scale both by one factor"):
        fit_rate_rule(found, LadderConfig().rate, "")
