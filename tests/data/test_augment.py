"""Drawing against loops that make the same random draws in the same order: equal event by event."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.data.augment import AugmentConfig, draw_events, drop_tokens
from userrep.data.split import unit_interval
from userrep.data.views import Samples

Sample = tuple[bool, int, int]  # parts of one history or not, events of the anchor, events of the positive


def build(parts: list[Sample]) -> Samples:
    """Samples whose views lie one after another, a cut history's without a gap."""
    rows, start = [], 5
    for is_cut, one, other in parts:
        positive = start + one + (0 if is_cut else 3)
        rows.append((0, start, one, positive, other, is_cut, 0, 0))
        start = positive + other
    columns = np.array(rows, np.int64).reshape(-1, 8).T
    return Samples(*columns[:5], *columns[5:7].astype(bool), columns[7])


def naive_draw(parts: list[Sample], config: AugmentConfig, seed: int) -> list[list[int]]:
    """Positions of every view: the anchors, then the positives."""
    rng, samples = np.random.default_rng(seed), build(parts)
    ranges = [*zip(samples.anchor_starts, samples.anchor_lengths, strict=True)]
    ranges += zip(samples.positive_starts, samples.positive_lengths, strict=True)
    views = [list(range(start, start + length)) for start, length in ranges]
    if config.cut == "random":
        luck = iter(rng.random(sum(map(len, views))))
        lucks = [[next(luck) for _ in view] for view in views]
        extra = rng.integers(0, 2, size=len(parts))
        for n, (is_cut, one, other) in enumerate(parts):
            if is_cut:
                whole, by = views[n] + views[len(parts) + n], lucks[n] + lucks[len(parts) + n]
                ranked = [position for _, position in sorted(zip(by, whole, strict=True))]
                half = (one + other + extra[n]) // 2
                views[n], views[len(parts) + n] = sorted(ranked[:half]), sorted(ranked[half:])
    share = rng.uniform(config.min_keep, 1.0, size=len(views))
    # Luck is dealt to events as they stood before the cut.
    luck = iter(rng.random(sum(map(len, views))))
    owner = {position: n for n, view in enumerate(views) for position in view}
    dealt: list[list[tuple[float, int]]] = [[] for _ in views]
    for start, length in ranges:
        for position in range(start, start + length):
            dealt[owner[position]].append((next(luck), position))
    kept = [min(max(int(np.ceil(s * len(view))), 1), config.max_events) for s, view in zip(share, views, strict=True)]
    return [sorted(position for _, position in sorted(mine)[:count]) for mine, count in zip(dealt, kept, strict=True)]


# A cut history has at least one event on each side; more than 255 views need more than 8 bits.
PARTS = st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(1, 9)), max_size=20)


@settings(max_examples=60, deadline=None)
@given(PARTS, st.sampled_from(["half", "random"]), st.floats(0.01, 1), st.integers(1, 8), st.integers(0, 99))
def test_drawn_events_are_those_of_the_reference(
    parts: list[Sample], cut: str, min_keep: float, max_events: int, seed: int
):
    check(parts, AugmentConfig.parse({"cut": cut, "min_keep": min_keep, "max_events": max_events}), seed)


@pytest.mark.parametrize("num_samples", [127, 128, 129, 40_000])
def test_drawn_events_of_many_samples_are_those_of_the_reference(num_samples: int):
    rng = np.random.default_rng(num_samples)
    lengths = rng.integers(1, 5, size=(num_samples, 2))
    parts = [(bool(n % 3), int(one), int(other)) for n, (one, other) in enumerate(lengths)]
    check(parts, AugmentConfig(cut="random", min_keep=0.3, max_events=3), seed=1)


def check(parts: list[Sample], config: AugmentConfig, seed: int) -> None:
    events = draw_events(build(parts), config, np.random.default_rng(seed))
    drawn = [events.positions[a:b].tolist() for a, b in itertools.pairwise(events.offsets)]
    assert drawn == naive_draw(parts, config, seed)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.floats(0, 0.99), st.integers(0, 99))
def test_tokens_stay_by_their_luck_and_every_item_keeps_one(lengths: list[int], probability: float, seed: int):
    offsets = np.cumsum([0, *lengths])
    positions = np.arange(offsets[-1]) + 1000
    kept, borders = drop_tokens(positions, offsets, probability, seed)
    luck = unit_interval(positions.astype(np.uint64), seed)
    for item, (start, stop) in enumerate(itertools.pairwise(offsets)):
        mine = range(start, stop)
        expected = [positions[n] for n in mine if luck[n] >= probability or luck[n] == max(luck[start:stop])]
        assert kept[borders[item] : borders[item + 1]].tolist() == expected
