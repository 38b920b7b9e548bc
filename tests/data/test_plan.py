from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.data.plan import Plan

Sample = tuple[int, int]


@st.composite
def plans(draw: st.DrawFn, max_epochs: int = 3) -> Plan:
    """Plans whose windows, tails and epochs come out in every proportion, also with several tail windows."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any))
    batch = draw(st.integers(1, max(1, min(sum(counts), draw(st.sampled_from([1, 3, 8, 50, 10_000]))))))
    per_epoch = sum(counts) // batch
    num_steps = draw(st.integers(0, per_epoch * max_epochs))
    return Plan(tuple(counts), batch, draw(st.integers(0, 2**40)), num_steps)


def batches(plan: Plan, start_step: int = 0) -> list[tuple[int, list[Sample]]]:
    """(step, samples) as a consumer of the windows sees them."""
    found = []
    for epoch, index in plan.windows(start_step):
        window = plan.window(epoch, index)
        row_groups, numbers = plan.samples(window)
        assert len(row_groups) == len(numbers) == window.num_steps * plan.global_batch_size
        samples = list(zip(row_groups.tolist(), numbers.tolist(), strict=True))
        for local in range(window.num_steps):
            step = window.first_step + local
            if start_step <= step < plan.num_steps:
                found.append((step, samples[local * plan.global_batch_size :][: plan.global_batch_size]))
    return found


@settings(deadline=None)
@given(plans())
def test_an_epoch_holds_each_sample_once_but_for_less_than_a_batch(plan: Plan):
    total, batch = sum(plan.counts), plan.global_batch_size
    everything = {(group, number) for group, count in enumerate(plan.counts) for number in range(count)}
    for epoch in range(2):
        seen: list[Sample] = []
        for window in plan.epoch_windows(epoch):
            row_groups, numbers = plan.samples(window)
            seen += zip(row_groups.tolist(), numbers.tolist(), strict=True)
        assert len(seen) == len(set(seen)) == total // batch * batch
        assert set(seen) <= everything
        assert len(everything) - len(seen) == plan.num_unused < batch


@settings(deadline=None)
@given(plans(), st.data())
def test_windows_cover_exactly_the_steps_that_remain(plan: Plan, data: st.DataObject):
    start = data.draw(st.integers(0, plan.num_steps + 3))
    from_zero, from_start = batches(plan), batches(plan, start)
    assert [step for step, _ in from_zero] == list(range(plan.num_steps))
    assert from_start == from_zero[start:]
    for epoch, index in plan.windows(start):  # none is prepared in vain
        window = plan.window(epoch, index)
        assert max(start, window.first_step) < min(plan.num_steps, window.first_step + window.num_steps)


@settings(deadline=None)
@given(plans(), st.integers(1, 50))
def test_a_longer_run_begins_with_the_shorter_one(plan: Plan, more: int):
    longer = replace(plan, num_steps=plan.num_steps + more)
    assert batches(longer)[: plan.num_steps] == batches(plan)


def test_epochs_and_seeds_order_differently_and_leave_out_other_samples():
    plan = Plan(counts=(17, 0, 40, 3, 25, 31), global_batch_size=10, seed=3, num_steps=11 * 20)
    epochs = [[sample for _, batch in batches(plan)[11 * n : 11 * (n + 1)] for sample in batch] for n in range(20)]
    assert len({tuple(epoch) for epoch in epochs}) == 20
    everything = {(group, number) for group, count in enumerate(plan.counts) for number in range(count)}
    left_out = Counter(sample for epoch in epochs for sample in everything - set(epoch))
    # 116 samples, 6 left out in each of 20 epochs: were it always the same ones, there would be 6 different ones.
    assert sum(left_out.values()) == 6 * 20
    assert len(left_out) > 40
    assert batches(plan) == batches(replace(plan))
    assert batches(plan) != batches(replace(plan, seed=4))


def test_a_row_group_is_spread_over_the_batches_of_its_window():
    # One window of 16 batches of 32: what was neighbours in the file must not be neighbours in a batch.
    plan = Plan(counts=(256, 256), global_batch_size=32, seed=0, num_steps=16)
    (_, _), *rest = batches(plan)
    for _, samples in rest:
        of_first = sum(group == 0 for group, _ in samples)
        # Hypergeometric with mean 16 and deviation 2.7; six deviations are beyond any luck over 16 batches.
        assert abs(of_first - 16) < 16.2
        numbers = np.array([number for group, number in samples if group == 0])
        assert numbers.max() - numbers.min() > 64


@pytest.mark.parametrize("counts", [(), (0, 0), (3, 4)])
def test_a_batch_that_the_data_cannot_fill_is_refused(counts: tuple[int, ...]):
    with pytest.raises(ValueError, match=rf"global_batch_size=8 is larger than the {sum(counts)} training samples"):
        Plan(counts=counts, global_batch_size=8, seed=0, num_steps=1)


def test_the_order_is_a_uniform_permutation():
    # One sample per row group in one window: both the row groups and the window's samples are permuted. Were the two
    # permutations drawn from one stream (numpy pads [seed, epoch] and [seed, epoch, 0] alike), the result would be a
    # permutation applied twice, which leaves 2 places unchanged on average; a uniform one leaves 1, with variance 1.
    num_epochs = 400
    plan = Plan(counts=(1,) * 64, global_batch_size=4, seed=5, num_steps=16 * num_epochs)
    unchanged = 0
    for epoch in range(num_epochs):
        (window,) = plan.epoch_windows(epoch)
        unchanged += int((plan.samples(window)[0] == np.arange(64)).sum())
    assert abs(unchanged / num_epochs - 1) < 5 / num_epochs**0.5
