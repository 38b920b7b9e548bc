import gc
import itertools
import pickle
import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.data.plan import SHARE_BITS, Coverage, Plan

Sample = tuple[int, int]  # row group, counted through all sources; number within it


def single(counts: tuple[int, ...], batch: int, seed: int, num_steps: int) -> Plan:
    """Plan over one source."""
    return Plan((np.array(counts, dtype=np.int64),), (1.0,), batch, seed, num_steps)


@st.composite
def plans(draw: st.DrawFn, max_sources: int = 3, max_epochs: int = 3) -> Plan:
    """Plans in which windows, epochs, row groups and batches are in every proportion to each other."""
    sizes = st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any)
    counts = draw(st.lists(sizes, min_size=1, max_size=max_sources))
    weights = draw(st.lists(st.floats(0.05, 20), min_size=len(counts), max_size=len(counts)))
    # The largest batch of which every source can fill its share.
    limit = min(int(sum(c) * sum(weights) / w * (1 - 1e-9)) for c, w in zip(counts, weights, strict=True))
    batch = draw(st.integers(1, max(1, min(limit, draw(st.sampled_from([1, 3, 8, 50, 10_000]))))))
    num_steps = draw(st.integers(0, 1 + max_epochs * max(map(sum, counts)) // batch))
    arrays = tuple(np.array(c, dtype=np.int64) for c in counts)
    return Plan(arrays, tuple(weights), batch, draw(st.integers(0, 2**40)), num_steps)


def batches(plan: Plan, start_step: int = 0) -> list[list[Sample]]:
    """Samples of steps [start_step, num_steps) as a consumer of the windows sees them."""
    found = []
    for window in plan.windows(start_step):
        row_groups, numbers = plan.samples(window)
        assert row_groups.shape == numbers.shape == (plan.window_steps * plan.global_batch_size,)
        samples = list(zip(row_groups.tolist(), numbers.tolist(), strict=True))
        for local in range(plan.window_steps):
            if start_step <= window * plan.window_steps + local < plan.num_steps:
                found.append(samples[local * plan.global_batch_size :][: plan.global_batch_size])
    return found


def everything(plan: Plan, source: int) -> set[Sample]:
    """All samples of a source."""
    before = sum(len(counts) for counts in plan.counts[:source])
    return {(before + g, number) for g, count in enumerate(plan.counts[source]) for number in range(count)}


@settings(deadline=None)
@given(plans())
def test_every_sample_of_every_source_exactly_once_per_epoch(plan: Plan):
    run = [sample for batch in batches(plan) for sample in batch]
    assert len(run) == plan.num_steps * plan.global_batch_size
    for source, coverage in enumerate(plan.coverage(plan.num_steps)):
        available = everything(plan, source)
        mine = [sample for sample in run if sample in available]
        epochs = [mine[start : start + len(available)] for start in range(0, len(mine), len(available))]
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch)
            assert len(epoch) == len(available) or epoch is epochs[-1]
        assert coverage == Coverage(len(available), *divmod(len(mine), len(available)))
    assert len(run) == sum(c.epochs * c.samples + c.begun for c in plan.coverage(plan.num_steps))


@settings(deadline=None)
@given(plans(), st.data())
def test_windows_hold_exactly_the_steps_that_remain(plan: Plan, data: st.DataObject):
    start = data.draw(st.integers(0, plan.num_steps + 3))
    assert batches(plan, start) == batches(plan)[start:]
    windows = plan.windows(start)
    assert bool(windows) == (start < plan.num_steps)
    for window in windows:  # none is prepared in vain
        steps = range(window * plan.window_steps, (window + 1) * plan.window_steps)
        assert max(start, steps.start) < min(plan.num_steps, steps.stop)


@settings(deadline=None)
@given(plans(), st.integers(1, 50))
def test_a_longer_run_begins_with_the_shorter_one(plan: Plan, more: int):
    longer = replace(plan, num_steps=plan.num_steps + more)
    assert batches(longer)[: plan.num_steps] == batches(plan)


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 1000), min_size=1, max_size=8), st.integers(0, 2**42), st.integers(1, 300))
def test_the_schedule_keeps_the_proportions_at_every_sample(weights: list[float], start: int, size: int):
    plan = Plan(tuple(np.array([10_000]) for _ in weights), tuple(weights), 1, 0, 0)
    taken = plan.taken(np.arange(start, start + size))
    assert [int(counts[0]) for counts in taken] == plan.taken(start)
    rest = Fraction(1)
    for source, counts in enumerate(taken):
        assert set(np.diff(counts).tolist()) <= {0, 1}
        later = Fraction(sum(map(Fraction, weights[source:])))
        ratio = Fraction(round(Fraction(weights[source]) / later * 2**SHARE_BITS), 2**SHARE_BITS)
        share, rest = rest * ratio, rest * (1 - ratio)
        # One source's rounding shifts the next one's: half a sample for each so far.
        assert all(
            abs(int(count) - share * total) <= Fraction(source + 1, 2)
            for total, count in zip(range(start, start + size), counts, strict=True)
        )
        # Every ratio is rounded to 2**-20, so after j sources a share is off by no more than j halves of that.
        assert abs(share - Fraction(weights[source]) / sum(map(Fraction, weights))) <= Fraction(source + 1, 2**21)
    assert (sum(taken) == np.arange(start, start + size)).all()


@settings(deadline=None)
@given(plans())
def test_every_batch_is_mixed_in_the_stated_proportions(plan: Plan):
    for batch in batches(plan):
        sources = Counter(np.searchsorted(plan.first_row_groups, [g for g, _ in batch], side="right") - 1)
        for source, weight in enumerate(plan.weights):
            share = plan.global_batch_size * weight / sum(plan.weights)
            # Up to (source + 1) / 2 samples early or late at either end of the batch; 1e-6 is the rounding of shares.
            assert abs(sources[source] - share) <= source + 1 + 1e-6 * plan.global_batch_size * plan.num_steps


def test_every_epoch_of_every_source_reads_row_groups_in_an_order_of_its_own():
    plan = Plan(tuple(np.full(32, 4) for _ in range(2)), (1.0, 1.0), 4, seed=1, num_steps=16)
    # The first window of an epoch, which takes four, holds eight row groups of each source, by luck the same ones once
    # in 10 million times.
    firsts = [np.unique(plan.samples(window)[0]) for window in range(0, 5 * 4, 4)]
    chosen = [tuple(first[first // 32 == source] % 32) for first in firsts for source in range(2)]
    assert all(len(row_groups) == 8 for row_groups in chosen)
    assert len(set(chosen)) == 5 * 2


def test_windows_of_an_epoch_are_permuted_differently():
    plan = single((16,) * 16, batch=4, seed=0, num_steps=64)  # four windows of four whole row groups
    windows = [np.unique(plan.samples(window)[0], return_inverse=True)[1] for window in range(4)]
    for one, other in itertools.combinations(windows, 2):
        # Of the 16 places that a row group has in its window, one of another window has 4 by luck, deviation 1.5; all
        # 16, if equal permutations were applied to other row groups.
        common = [int(((one == a) & (other == b)).sum()) for a in range(4) for b in range(4)]
        assert max(common) < 16


def test_epochs_and_seeds_order_differently():
    plan = single((17, 0, 40, 3, 25, 31), batch=29, seed=3, num_steps=80)  # 116 samples: four steps are an epoch
    epochs = [tuple(sample for batch in batches(plan)[start : start + 4] for sample in batch) for start in range(80)]
    assert all(set(epoch) == everything(plan, 0) for epoch in epochs[::4])
    assert len(set(epochs[::4])) == 20
    assert batches(plan) == batches(replace(plan))
    assert batches(plan) != batches(replace(plan, seed=4))


def test_a_row_group_is_spread_over_the_batches_of_its_window():
    # One window of 16 batches of 32: what was neighbours in the file must not be neighbours in a batch.
    plan = single((256, 256), batch=32, seed=0, num_steps=16)
    assert len(plan.windows()) == 1
    for samples in batches(plan):
        of_first = sum(group == 0 for group, _ in samples)
        # Hypergeometric with mean 16 and deviation 2.7; six deviations are beyond any luck over 16 batches.
        assert abs(of_first - 16) < 16.2
        numbers = np.array([number for group, number in samples if group == 0])
        assert numbers.max() - numbers.min() > 64


def test_a_divided_row_group_gives_each_window_a_random_part():
    # An epoch of 256 samples in four windows. The row groups of 8 and 24 shift the others against the windows, so that
    # some are divided into 8 and 24 samples: these must be random choices, other ones each time.
    plan = single((32,) * 7 + (8, 24), batch=4, seed=0, num_steps=64 * 160)
    parts: dict[int, list[frozenset[int]]] = {group: [] for group in range(7)}
    for window in plan.windows():
        row_groups, numbers = plan.samples(window)
        for group in parts:
            part = frozenset(numbers[row_groups == group].tolist())
            if len(part) == 8:
                parts[group].append(part)
    found = [part for group in parts.values() for part in group]
    assert len(found) > 50
    assert len(set(found)) == len(found)
    # The numbers of a part of 8 of 32 are uniform: mean 15.5, deviation of the mean of n parts < 9.23 / sqrt(8 n).
    mean = np.mean([number for part in found for number in part])
    assert abs(mean - 15.5) < 5 * 9.23 / (8 * len(found)) ** 0.5


def test_large_row_groups_make_longer_windows_so_that_little_is_read_twice():
    plan = single((4000,) * 50, batch=10, seed=0, num_steps=1000)
    assert plan.window_steps * plan.global_batch_size == 4 * 4000
    reads = sum(len(np.unique(plan.samples(window)[0])) for window in range(12))  # 48 row groups' worth of samples
    assert reads <= 12 * 5


@pytest.mark.parametrize("counts", [(), (0, 0), (3, 4)])
def test_a_batch_that_the_data_cannot_fill_is_refused(counts: tuple[int, ...]):
    with pytest.raises(
        ValueError, match=rf"global_batch_size=8 is larger than the {sum(counts)} training samples: low"
    ):
        single(counts, batch=8, seed=0, num_steps=1)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "1 weights for 2 sources"),
        ((1.0, 0.0), "must be positive"),
        ((1.0, float("nan")), "must be positive"),
        ((float("inf"), 1.0), "must be positive"),
        ((1.0, 1e-9), r"at least 2\*\*-20"),
        ((1.0, 1.0), "than the 3 training samples of source 1, of which it takes 4: lower .* or the source's weight"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights: tuple[float, ...], message: str):
    counts = (np.array([50, 50]), np.array([1, 2]))
    with pytest.raises(ValueError, match=message):
        Plan(counts, weights, 8, seed=0, num_steps=1)
    with pytest.raises(ValueError, match="0 weights for 0 sources"):
        Plan((), (), 8, seed=0, num_steps=1)


def test_the_order_is_a_uniform_permutation():
    # One sample per row group in one window: both the row groups and the window's samples are permuted. Were the two
    # permutations drawn from one stream, the result would be a permutation applied twice, which leaves 2 places
    # unchanged on average; a uniform one leaves 1, with variance 1.
    num_epochs = 400
    plan = single((1,) * 64, batch=4, seed=5, num_steps=16 * num_epochs)
    assert len(plan.windows()) == num_epochs
    unchanged = sum(int((plan.samples(window)[0] == np.arange(64)).sum()) for window in plan.windows())
    assert abs(unchanged / num_epochs - 1) < 5 / num_epochs**0.5


@pytest.mark.parametrize("samples_per_group", [10, 10_000])
def test_memory_is_a_few_bytes_for_a_row_group_and_none_for_a_sample(samples_per_group: int):
    num_row_groups = 20_000
    gc.collect()
    tracemalloc.start()
    try:
        plan = Plan((np.full(num_row_groups, samples_per_group),), (1.0,), 64, 0, 10**9)
        for window in itertools.islice(plan.windows(10**8), 3):
            plan.samples(window)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held <= 64 * num_row_groups
    assert len(pickle.dumps(plan)) <= 16 * num_row_groups
