"""How a batch is divided among ranks, and what a method is told of it."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.continual import tiny_method
from tests.support.tiny_cell import tiny_tasks
from userrep.continual.method import Progress
from userrep.continual.network import TaskSpec
from userrep.training.continual_step import own_part, take_step

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


def test_a_method_is_told_the_rows_of_its_histories() -> None:
    method, task = tiny_method("fineall"), TASKS.tasks[1]
    method.begin_task(TaskSpec(task.name, task.kind, task.num_classes))
    optimizer = torch.optim.Adam(method.trainable())
    with mock.patch.object(method, "loss", side_effect=method.loss) as loss:
        take_step(method, optimizer, task, TASKS.sequences, task.samples("train")[::7], Progress(2, 3))
    items, _, progress = loss.call_args.args
    assert np.array_equal(TASKS.sequences.items[progress.rows.numpy()], items.numpy())
    assert (progress.step, progress.num_steps, progress.task) == (2, 3, None)
