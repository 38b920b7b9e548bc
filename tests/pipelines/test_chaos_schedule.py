"""The schedule of faults: seeded, a prefix of every longer one, fair to all kinds, and never too late."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.chaos_schedule import DAMAGES, LAST_STEPS, MEANING, kinds_for, make_schedule

SINGLE = kinds_for(num_nodes=1, can_lock_storage=True)


@given(seed=st.integers(0, 2**32), num_faults=st.integers(0, 60), num_nodes=st.integers(1, 3), can_lock=st.booleans())
def test_every_kind_comes_equally_often_and_in_time(seed: int, num_faults: int, num_nodes: int, can_lock: bool) -> None:
    kinds = kinds_for(num_nodes, can_lock)
    faults = make_schedule(num_faults, seed, kinds, num_steps=40, checkpoint_every=5, num_nodes=num_nodes)
    assert [fault.index for fault in faults] == list(range(num_faults))
    counts = Counter(fault.kind for fault in faults)
    assert all(counts[kind] in (num_faults // len(kinds), -(-num_faults // len(kinds))) for kind in kinds)
    assert counts.total() == num_faults == sum(counts[kind] for kind in kinds)
    for fault in faults:
        assert 1 <= fault.step <= 40 - LAST_STEPS
        assert fault.step > 5 or fault.kind not in DAMAGES
        assert 0 <= fault.choice < 1
        assert 0 <= fault.place < 1
        assert 0 <= fault.bit < 8
        assert not fault.has_own_cluster or (fault.kind in ("driver", "raylet") and num_nodes == 1)
        assert fault.has_own_cluster or fault.kind != "raylet"


@given(seed=st.integers(0, 2**32), shorter=st.integers(0, 30), longer=st.integers(30, 60))
def test_a_longer_schedule_begins_with_the_shorter_one(seed: int, shorter: int, longer: int) -> None:
    schedules = [make_schedule(number, seed, SINGLE, 40, 5) for number in (shorter, longer)]
    assert schedules[1][:shorter] == schedules[0]


def test_the_seed_decides() -> None:
    assert make_schedule(50, 7, SINGLE, 40, 5) == make_schedule(50, 7, SINGLE, 40, 5)
    assert make_schedule(50, 7, SINGLE, 40, 5) != make_schedule(50, 8, SINGLE, 40, 5)


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_kinds_are_those_that_can_be_made(num_nodes: int) -> None:
    assert set(kinds_for(1, True)) | set(kinds_for(2, True)) == set(MEANING)
    assert ("raylet" in kinds_for(num_nodes, True)) == (num_nodes == 1)
    assert ("node" in kinds_for(num_nodes, True)) == (num_nodes == 2)
    assert "storage" not in kinds_for(num_nodes, False)
