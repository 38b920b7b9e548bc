"""How a batch is divided among ranks, what a method is told of it, and which rows of a sparse table a step moves."""

import math
from typing import cast
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.continual import tiny_method
from tests.support.tiny_cell import NUM_ITEMS, tiny_tasks
from userrep.continual.catalog import METHODS, build_method
from userrep.continual.method import Method, Progress
from userrep.continual.network import TaskSpec
from userrep.models.nextitnet import NextItNet, NextItNetConfig
from userrep.training.continual_step import Optimizers, open_optimizers, own_part, take_step

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
    optimizers = open_optimizers(method, 0.01)
    with mock.patch.object(method, "loss", side_effect=method.loss) as loss:
        take_step(method, optimizers, task, TASKS.sequences, task.samples("train")[::7], Progress(2, 3))
    items, _, progress = loss.call_args.args
    assert np.array_equal(TASKS.sequences.items[progress.rows.numpy()], items.numpy())
    assert (progress.step, progress.num_steps, progress.task) == (2, 3, None)


def new_method(name: str, sparse_items: bool) -> Method:
    torch.manual_seed(0)
    config = NextItNetConfig(dim=8, dilations=(1, 2), sparse_items=sparse_items)
    return build_method(name, {}, lambda: NextItNet(config, NUM_ITEMS)).double()


def begin(method: Method, number: int) -> Optimizers:
    torch.manual_seed(number)
    task = TASKS.tasks[number]
    method.begin_task(TaskSpec(task.name, task.kind, task.num_classes))
    method.begin_phase(method.phases[0])
    return open_optimizers(method, 0.01)


def step_of(method: Method, optimizers: Optimizers, number: int, samples: np.ndarray) -> dict[str, float]:
    torch.manual_seed(1)
    return take_step(method, optimizers, TASKS.tasks[number], TASKS.sequences, samples, Progress(0, 2, number))


def table_of(method: Method) -> torch.Tensor:
    return cast(NextItNet, method.network.backbone).item_embedding.weight


def moments_of(optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Of the table; a copy."""
    [state] = optimizers[1].state.values()
    return {name: state[name].clone() for name in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("name", METHODS)
def test_where_all_rows_are_read_sparse_tables_move_like_others(name: str) -> None:
    """But for eps, which SparseAdam adds elsewhere."""
    methods = [new_method(name, is_sparse) for is_sparse in (True, False)]
    for number, task in enumerate(TASKS.tasks[:2]):
        opened = [begin(method, number) for method in methods]
        sparse = opened[0]
        is_frozen = number == 1 and name in ("hat", "conure", "peterrec", "piggyback")
        assert [len(optimizers) for optimizers in opened] == [1 if is_frozen else 2, 1]
        for group in (group for optimizers in opened for optimizer in optimizers for group in optimizer.param_groups):
            group["eps"] = 1e-12  # far above what sums are rounded by, far below gradients
        for _ in range(3):
            metrics, expected = (
                step_of(method, optimizers, number, task.samples("train"))
                for method, optimizers in zip(methods, opened, strict=True)
            )
            assert metrics == pytest.approx(expected, rel=1e-6)
            assert is_frozen or moments_of(sparse)["exp_avg"].abs().sum(dim=1).min() > 0
        for (key, value), other in zip(methods[0].named_parameters(), methods[1].parameters(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-6, msg=key)
        for method in methods:
            method.end_task()


def test_rows_that_no_sample_reads_stay_bit_for_bit() -> None:
    """Values and moments; of all others they are those of Adam written out."""
    method = new_method("fineall", True)
    optimizers = begin(method, 2)
    rng = np.random.default_rng(0)
    first, second = np.zeros((2, NUM_ITEMS, 8))
    for number in range(1, 6):
        samples = rng.permutation(TASKS.tasks[2].samples("train"))[:2]
        before = table_of(method).detach().numpy().copy()
        step_of(method, optimizers, 2, samples)
        grad = cast(torch.Tensor, table_of(method).grad)
        read = set(grad.indices()[0].tolist())
        assert read <= {0, *TASKS.sequences.items[TASKS.tasks[2].rows[samples]].ravel().tolist()}
        assert 0 < len(read) < NUM_ITEMS
        after, dense = table_of(method).detach().numpy(), grad.to_dense().numpy()
        for row in range(NUM_ITEMS):
            if row not in read:
                assert np.array_equal(after[row], before[row])
                continue
            first[row] = 0.9 * first[row] + 0.1 * dense[row]
            second[row] = 0.999 * second[row] + 0.001 * dense[row] ** 2
            rate = 0.01 * math.sqrt(1 - 0.999**number) / (1 - 0.9**number)
            assert after[row] == pytest.approx(before[row] - rate * first[row] / (np.sqrt(second[row]) + 1e-8))
        moments = moments_of(optimizers)
        assert moments["exp_avg"].numpy() == pytest.approx(first, abs=1e-15)
        assert moments["exp_avg_sq"].numpy() == pytest.approx(second, abs=1e-15)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_sparse_gradient_that_is_not_finite_is_not_stepped_along(value: float) -> None:
    method = new_method("fineall", True)
    optimizers, samples = begin(method, 0), TASKS.tasks[0].samples("train")
    step_of(method, optimizers, 0, samples)
    before, moments = table_of(method).detach().clone(), moments_of(optimizers)
    table_of(method).register_hook(lambda grad: grad * value)  # only of the table
    metrics = step_of(method, optimizers, 0, samples)
    assert math.isfinite(metrics["train/loss"])
    assert not math.isfinite(metrics["train/grad_norm"])
    assert torch.equal(table_of(method), before)
    assert all(torch.equal(moments[name], other) for name, other in moments_of(optimizers).items())
