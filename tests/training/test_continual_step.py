"""How a batch is divided among ranks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny_cell import tiny_tasks
from userrep.training.continual_step import own_part

TASKS = tiny_tasks()


@given(size=st.integers(1, 40), world_size=st.integers(1, 9), number=st.integers(0, 2), seed=st.integers(0, 9))
def test_parts_cover_the_batch_and_shares_weigh_predictions(size: int, world_size: int, number: int, seed: int) -> None:
    task, items = TASKS.tasks[number], TASKS.sequences.items
    samples = np.random.default_rng(seed).permutation(task.samples("train"))[:size]

    def num_predictions(part: list[int]) -> int:
        if task.kind != "next_item":
            return len(part)
        return sum(int(item != 0) for sample in part for item in items[task.rows[sample]][1:])

    covered: list[int] = []
    total = 0.0
    for rank in range(world_size):
        part, share = own_part(task, TASKS.sequences, samples, rank, world_size)
        expected = [int(s) for place, s in enumerate(samples) if place in _places(len(samples), rank, world_size)]
        assert len(part) > 0
        if expected:
            assert part.tolist() == expected
            assert share == pytest.approx(num_predictions(expected) / num_predictions(samples.tolist()))
        else:
            assert share == 0
        covered += expected
        total += share
    assert covered == samples.tolist()
    assert total == pytest.approx(1)


def _places(size: int, rank: int, world_size: int) -> range:
    return range(rank * size // world_size, (rank + 1) * size // world_size)


def test_one_process_takes_all_of_it_without_a_factor() -> None:
    samples = TASKS.tasks[0].samples("train")
    part, share = own_part(TASKS.tasks[0], TASKS.sequences, samples, 0, 1)
    assert np.array_equal(part, samples)
    assert share == 1.0
