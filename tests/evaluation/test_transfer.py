"""Transfer against the published tables, intervals against known coverage."""

import numpy as np
import pytest
from scipy import stats

from userrep.evaluation.transfer import backward_transfer, forward_transfer, mean_interval, paired_difference

NAN = np.nan
TASKS = ("T1", "T2", "T3", "T4", "T5", "T6")
REVERSED = ("T1", "T6", "T5", "T4", "T3", "T2")
# arXiv 2306.01792, data set TTL: scores of single-task models, and per method the score after all tasks, BWT and FWT.
SINGLE = dict(zip(TASKS, (0.0446, 0.0104, 0.0168, 0.4475, 0.8901, 0.4376), strict=True))
Published = tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...], tuple[float, ...]]
PUBLISHED: dict[str, Published] = {
    "HAT": (
        TASKS,
        (0.0424, 0.0174, 0.0279, 0.5880, 0.9002, 0.5126),
        (-11.30, -7.45, -0.71, -2.52, -1.98, NAN),
        (NAN, 80.77, 67.25, 34.79, 3.17, 17.14),
    ),
    "TERACON": (
        TASKS,
        (0.0474, 0.0189, 0.0316, 0.6066, 0.9048, 0.5386),
        (-0.83, 0.0, 3.27, 1.23, 0.01, NAN),
        (NAN, 81.73, 82.13, 33.91, 1.64, 23.08),
    ),
    "CONURE": (
        TASKS,
        (0.0457, 0.0169, 0.0276, 0.5546, 0.8967, 0.5230),
        (0, 0, 0, 0, 0, NAN),
        (NAN, 62.50, 64.29, 23.93, 0.74, 19.52),
    ),
    "HAT reversed": (
        REVERSED,
        (0.0422, 0.5025, 0.8980, 0.5770, 0.0269, 0.0184),
        (-11.72, -4.70, -0.33, -1.72, -0.37, NAN),
        (NAN, 20.49, 1.22, 31.19, 60.71, 76.92),
    ),
    "TERACON reversed": (
        REVERSED,
        (0.0474, 0.5365, 0.9039, 0.6042, 0.0313, 0.0190),
        (-0.83, 1.84, 0.93, 0.07, 2.62, NAN),
        (NAN, 20.38, 0.61, 34.92, 81.55, 82.69),
    ),
    "CONURE reversed": (
        REVERSED,
        (0.0457, 0.5322, 0.8849, 0.5546, 0.0164, 0.0119),
        (0, 0, 0, 0, 0, NAN),
        (NAN, 21.62, -0.58, 23.93, -2.38, 14.42),
    ),
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_published_transfer_follows_from_published_scores(method: str):
    """Scores right after training follow from score and BWT; they have four decimals, as all scores there."""
    order, final, backward, forward = (np.array(row) for row in PUBLISHED[method])
    single = np.array([SINGLE[task] for task in order])
    learned = np.round(final / (1 + np.nan_to_num(backward) / 100), 4)
    scores = np.where(np.tri(6, dtype=bool), 1.0, NAN)
    scores[np.diag_indices(6)] = learned
    scores[-1] = final
    # Published to two decimals; a few are one off in the last digit, and so are of scores before rounding.
    np.testing.assert_allclose(backward_transfer(scores), backward, atol=0.015)
    np.testing.assert_allclose(forward_transfer(scores, single), forward, atol=0.015)
    assert np.isnan(backward_transfer(scores)[-1])
    assert np.isnan(forward_transfer(scores, single)[0])


def test_transfer_cell_by_cell_and_seed_by_seed():
    rng = np.random.default_rng(0)
    scores, single = rng.uniform(0.1, 1, (3, 4, 4)), rng.uniform(0.1, 1, (3, 4))
    scores[:, ~np.tri(4, dtype=bool)] = NAN
    backward, forward = backward_transfer(scores), forward_transfer(scores, single)
    for seed in range(3):
        for i in range(4):
            learned = scores[seed][i][i]
            expected = (scores[seed][3][i] - learned) / learned * 100 if i < 3 else NAN
            assert backward[seed, i] == pytest.approx(expected, nan_ok=True)
            expected = (learned - single[seed][i]) / single[seed][i] * 100 if i > 0 else NAN
            assert forward[seed, i] == pytest.approx(expected, nan_ok=True)
    assert np.array_equal(forward_transfer(scores[0], single[0]), forward[0], equal_nan=True)


def test_percent_of_nothing_is_unknown():
    scores = np.array([[0.0, NAN, NAN], [0.1, 0.2, NAN], [0.1, 0.2, 0.3]])
    assert np.isnan(backward_transfer(scores)[0])
    assert backward_transfer(scores)[1] == 0
    transfer = forward_transfer(scores, np.array([0.1, 0.0, 0.2]))
    assert np.isnan(transfer[1])
    assert transfer[2] == pytest.approx(50)


def test_nothing_given_is_changed():
    scores, single = np.array([[0.5, NAN], [0.4, 0.6]]), np.array([0.5, 0.5])
    before = scores.copy(), single.copy()
    backward_transfer(scores)
    forward_transfer(scores, single)
    assert np.array_equal(scores, before[0], equal_nan=True)
    assert (single == before[1]).all()


def test_matrices_that_are_none():
    transposed = np.array([[0.5, 0.4], [NAN, 0.6]])
    with pytest.raises(ValueError, match=r"R\[1, 0\] and 0 other scores"):
        backward_transfer(transposed)
    with pytest.raises(ValueError, match=r"R\[1, 1, 1\]"):
        forward_transfer(np.stack([np.eye(2), np.diag([1, NAN])]), np.ones(2))
    for shape in ((2, 3), (3,), (0, 0)):
        with pytest.raises(ValueError, match="R must be"):
            backward_transfer(np.ones(shape))


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
def test_interval_is_that_of_students_t(num_seeds: int):
    values = np.random.default_rng(num_seeds).normal(size=(num_seeds, 4, 2))
    found = mean_interval(values)
    assert found.num_seeds == num_seeds
    for place in np.ndindex(4, 2):
        sample = values[(slice(None), *place)]
        expected = stats.ttest_1samp(sample, 0).confidence_interval(0.95)
        assert found.mean[place] == pytest.approx(sum(sample) / num_seeds)
        assert (found.low[place], found.high[place]) == pytest.approx((expected.low, expected.high))


def test_interval_covers_the_truth_as_often_as_it_says():
    values = np.random.default_rng(0).normal(3, 2, size=(3, 20_000))  # three seeds, 20,000 experiments
    found = mean_interval(values)
    covered = ((found.low <= 3) & (found.high >= 3)).mean()
    assert abs(covered - 0.95) <= 5 * (0.95 * 0.05 / 20_000) ** 0.5


def test_one_seed_has_no_interval():
    found = mean_interval(np.array([[0.5, 0.6]]))
    assert found.mean.tolist() == [0.5, 0.6]
    assert np.isnan(found.low).all()
    assert np.isnan(found.high).all()
    with pytest.raises(ValueError, match="at least one seed"):
        mean_interval(np.zeros((0, 3)))


def test_what_both_owe_to_the_seed_cancels():
    rng = np.random.default_rng(0)
    seed_effect = rng.normal(0, 10, (5, 1))
    own, other = (seed_effect + rng.normal(shift, 0.1, (5, 3)) for shift in (1, 0))
    difference = paired_difference(own, other)
    assert (difference.low > 0.5).all()
    assert (difference.high < 1.5).all()
    assert (mean_interval(own).low < mean_interval(other).high).all()  # taken alone, the intervals overlap
    assert paired_difference(own, own).low.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="the same seeds and tasks"):
        paired_difference(own, other[:4])


def test_unknown_cells_stay_unknown():
    values = np.array([[NAN, 1.0], [NAN, 3.0]])
    found = mean_interval(values)
    assert np.isnan([found.mean[0], found.low[0], found.high[0]]).all()
    assert found.mean[1] == 2
