import itertools
from statistics import mean, stdev

import numpy as np
import pytest

from benchmarks.plan import batches_of_epoch, expected_rates, measure_rates, meeting_rate, returning_share
from userrep.data.plan import Plan


def test_batches_of_an_epoch_are_those_of_the_run() -> None:
    plan = Plan((np.array([5, 0, 30, 8]),), (1.0,), 4, seed=2, num_steps=32)  # 43 samples: epochs end within batches
    run = [sample for w in plan.windows() for sample in zip(*map(np.ndarray.tolist, plan.samples(w)), strict=True)]
    for epoch in range(2):
        expected = {sample: place // 4 for place, sample in enumerate(run) if place // 43 == epoch}
        assert batches_of_epoch(plan, epoch).tolist() == [expected[sample] for sample in sorted(expected)]


def test_rates_are_those_of_pairs_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    batch_size, row_groups = 6, np.repeat(np.arange(5), 12)
    one, other = (rng.permutation(60) // batch_size + first for first in (0, 10))
    all_pairs = list(itertools.combinations(range(60), 2))
    near = [(i, j) for i, j in all_pairs if row_groups[i] == row_groups[j]]
    assert meeting_rate(one, row_groups) == sum(one[i] == one[j] for i, j in near) / len(near)
    met_twice = sum(one[i] == one[j] and other[i] == other[j] for i, j in all_pairs)
    # Each of the 60 users has 5 others in a batch; a pair that meets twice is a returning user for both.
    assert returning_share(one, other, batch_size) == pytest.approx(2 * met_twice / (60 * 5))


@pytest.mark.parametrize(("row_group_size", "num_row_groups"), [(64, 64), (48, 64), (2, 512), (400, 32)])
def test_users_of_a_row_group_meet_as_often_as_the_plan_implies(row_group_size: int, num_row_groups: int) -> None:
    batch_size, num_epochs = 32, 40
    plan = Plan((np.full(num_row_groups, row_group_size),), (1.0,), batch_size, seed=0, num_steps=0)
    size = num_row_groups * row_group_size
    assert size % (plan.window_steps * batch_size) == 0, "the derivation is for epochs of whole windows"
    row_groups = np.repeat(np.arange(num_row_groups), row_group_size)
    expected = expected_rates(num_row_groups, row_group_size, batch_size, plan.window_steps)
    epochs = [batches_of_epoch(plan, epoch) for epoch in range(num_epochs)]
    near = [meeting_rate(epoch, row_groups) for epoch in epochs]
    assert abs(mean(near) - expected[0]) < 5 * stdev(near) / num_epochs**0.5
    assert expected[0] < 1 / plan.window_steps
    # Pairs of epochs share epochs; those of (0, 1), (2, 3), ... are independent.
    returning = [returning_share(one, other, batch_size) for one, other in zip(epochs[::2], epochs[1::2], strict=True)]
    assert abs(mean(returning) - expected[1]) < 5 * stdev(returning) / len(returning) ** 0.5


def test_a_full_shuffle_has_the_rates_of_independent_batches() -> None:
    rng = np.random.default_rng(0)
    batch_size, row_groups = 32, np.repeat(np.arange(64), 64)
    epochs = [rng.permutation(4096) // batch_size for _ in range(20)]
    rates = measure_rates(epochs, row_groups, batch_size)
    assert len(rates.returning) == 20 * 19 // 2
    for values in rates:
        assert abs(mean(values) - 31 / 4095) < 5 * stdev(values) / len(values) ** 0.5
