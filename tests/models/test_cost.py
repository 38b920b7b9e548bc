"""Counted operations against torch's FLOP counter on real training steps, forward, backward and second forward."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.harness import count_flops
from userrep.data.batch import UserBatch
from userrep.models.clue import Clue, ClueConfig, count_parameters
from userrep.models.cost import Sequences, StepShape, parameter_counts, step_cost
from userrep.training.encoding import ChunkPlan, encode
from userrep.training.objective import ClueObjective, LossConfig, step_shape

VOCAB = 40
WHOLE = ChunkPlan(10**9, 2)
# The issue asks for 2%; the formulas are exact, and a deviation would be an operation that was forgotten.
EXACT = 1e-9


def make_batch(seed: int, users: int, longest_item: int, longest_history: int, step: int = 0) -> UserBatch:
    """Random lengths from 1 on; items are repeated, users are of three groups."""
    rng = np.random.default_rng(seed)
    histories = rng.integers(1, longest_history + 1, 2 * users)
    history_items = rng.integers(0, max(1, histories.sum() // 2), histories.sum())
    items = rng.integers(1, longest_item + 1, history_items.max() + 1)
    return UserBatch(
        tokens=rng.integers(0, VOCAB, items.sum()).astype(np.int32),
        token_offsets=np.concatenate(([0], items.cumsum())).astype(np.int32),
        history_items=history_items.astype(np.int32),
        history_offsets=np.concatenate(([0], histories.cumsum())).astype(np.int32),
        user_keys=np.arange(users),
        service_pairs=np.sort(rng.integers(0, 3, users)),
        item_keys=np.arange(len(items)),
        step=step,
    )


def counted(config: ClueConfig, batch: UserBatch, plan: ChunkPlan, loss: LossConfig, bag_steps: int = 0) -> float:
    """Operations of forward and backward of a step, as torch counts them."""
    torch.manual_seed(0)
    objective = ClueObjective(Clue(config, VOCAB), bag_steps, loss)
    objective._planner.plan = lambda _: plan
    return count_flops(lambda: objective(batch)[0].backward())


SHAPES = {
    "one layer each": ClueConfig(dim=24, num_heads=3, mlp_ratio=4),
    "more item layers": ClueConfig(dim=40, num_heads=5, item_layers=3, service_layers=1, mlp_ratio=1, head_ratio=3),
    "more service layers": ClueConfig(dim=16, num_heads=1, item_layers=1, service_layers=2, mlp_ratio=3),
    "no item layer": ClueConfig(dim=8, num_heads=2, item_layers=0, service_layers=2, mlp_ratio=2),
    "no service layer": ClueConfig(dim=8, num_heads=2, item_layers=2, service_layers=0, mlp_ratio=2),
}


@pytest.mark.parametrize("plan", [WHOLE, ChunkPlan(25, 2), ChunkPlan(40, 3)], ids=str)
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_training_step_costs_what_torch_counts(config: ClueConfig, plan: ChunkPlan) -> None:
    batch, loss = make_batch(1, users=5, longest_item=11, longest_history=7), LossConfig(tile_size=3)
    cost = step_cost(config, step_shape(batch, plan, loss))
    assert cost.total_flops == pytest.approx(counted(config, batch, plan, loss), rel=EXACT)
    if plan == WHOLE:  # what is left to be made again are the tiles of the loss
        assert cost.total_flops - cost.model_flops == cost.loss.again


@pytest.mark.parametrize("negatives", ["service_pair", "batch"])
@pytest.mark.parametrize("form", ["info_nce", "sigmoid"])
@pytest.mark.parametrize("tile_size", [17, 512])
def test_the_loss_costs_what_torch_counts(form: str, negatives: str, tile_size: int) -> None:
    # Many users and short histories: what the loss costs shows.
    config = ClueConfig(dim=16, num_heads=2, item_layers=0, service_layers=0, head_ratio=1)
    loss = LossConfig.parse({"form": form, "negatives": negatives, "tile_size": tile_size})
    batch = make_batch(2, users=61, longest_item=3, longest_history=2)
    cost = step_cost(config, step_shape(batch, WHOLE, loss))
    assert cost.loss.total > cost.total_flops / 5
    assert cost.total_flops == pytest.approx(counted(config, batch, WHOLE, loss), rel=EXACT)


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    layers=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    longest=st.tuples(st.integers(1, 15), st.integers(1, 9)),
    plan=st.builds(ChunkPlan, st.integers(1, 200), st.integers(1, 6)),
)
def test_any_step_costs_what_torch_counts(
    seed: int, heads: int, head_dim: int, layers: tuple[int, int], longest: tuple[int, int], plan: ChunkPlan
) -> None:
    config = ClueConfig(
        dim=heads * head_dim, num_heads=heads, item_layers=layers[0], service_layers=layers[1], mlp_ratio=2
    )
    batch = make_batch(seed, users=2, longest_item=longest[0], longest_history=longest[1])
    expected = counted(config, batch, plan, LossConfig())
    assert step_cost(config, step_shape(batch, plan, LossConfig())).total_flops == pytest.approx(expected, rel=EXACT)


def test_steps_without_blocks_cost_their_head_and_loss() -> None:
    config, plan = ClueConfig(dim=24, num_heads=3, item_layers=2, service_layers=2), ChunkPlan(30, 2)
    batch, loss = make_batch(3, users=9, longest_item=8, longest_history=6), LossConfig()
    cost = step_cost(config, step_shape(batch, plan, loss), use_blocks=False)
    assert cost.items.total == cost.histories.total == 0
    assert cost.total_flops == pytest.approx(counted(config, batch, plan, loss, bag_steps=1), rel=EXACT)


def test_forward_and_backward_are_told_apart() -> None:
    config, batch = SHAPES["more item layers"], make_batch(4, users=7, longest_item=9, longest_history=9)
    model = Clue(config, VOCAB)
    cost = step_cost(config, step_shape(batch, WHOLE, LossConfig()))
    parts = (cost.items, cost.histories, cost.head)
    with torch.no_grad():
        forward = count_flops(lambda: encode(model, batch, WHOLE))
    both = count_flops(lambda: encode(model, batch, WHOLE).sum().backward())
    assert sum(part.forward for part in parts) == pytest.approx(forward, rel=EXACT)
    assert sum(part.backward for part in parts) == pytest.approx(both - forward, rel=EXACT)
    assert sum(part.again for part in parts) == 0


def test_the_padded_figure_is_what_a_padded_batch_costs() -> None:
    config = ClueConfig(dim=16, num_heads=2, item_layers=2, service_layers=1, mlp_ratio=4)
    batch, loss = make_batch(5, users=4, longest_item=6, longest_history=5), LossConfig(form="sigmoid")
    longest_item, longest = int(np.diff(batch.token_offsets).max()), int(np.diff(batch.history_offsets).max())
    slots = 8 * longest
    padded = replace(
        batch,
        tokens=np.zeros(slots * longest_item, dtype=np.int32),
        token_offsets=np.arange(slots + 1) * longest_item,
        history_items=np.arange(slots),
        history_offsets=np.arange(9) * longest,
    )
    # The sigmoid loss makes no tile twice, so all that is counted is forward and backward.
    cost = step_cost(config, step_shape(batch, ChunkPlan(20, 2), loss))
    assert cost.padded_flops == pytest.approx(counted(config, padded, WHOLE, loss), rel=EXACT)
    assert cost.padded_flops > cost.total_flops


def test_cost_of_the_mean_step_is_the_mean_cost() -> None:
    config, plan = SHAPES["more service layers"], ChunkPlan(40, 2)
    shapes = [step_shape(make_batch(seed, 6 + seed, 9, 5), plan, LossConfig()) for seed in range(4)]
    costs = [step_cost(config, shape) for shape in shapes]
    mean = step_cost(config, StepShape.mean(shapes))
    assert mean.total_flops == pytest.approx(np.mean([cost.total_flops for cost in costs]), rel=1e-12)
    assert mean.padded_flops == pytest.approx(np.mean([cost.padded_flops for cost in costs]), rel=1e-12)


def test_sequences_written_out() -> None:
    assert Sequences.of(np.array([1, 3, 1, 4], dtype=np.int32)) == Sequences(4, 9, 9 + 16)
    assert Sequences.of(np.full(7, 300, dtype=np.int16)) == Sequences.equal(7, 300) == Sequences(7, 2100, 630_000)
    assert Sequences.of(np.ones(5)) == Sequences.equal(5, 1) == Sequences(5, 5, 0)


@settings(deadline=None, max_examples=30)
@given(
    dim=st.integers(1, 40),
    layers=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    ratios=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 50)),
)
def test_parameters_are_those_of_the_model(
    dim: int, layers: tuple[int, int], ratios: tuple[int, int], sizes: tuple[int, int]
) -> None:
    config = ClueConfig(
        dim=dim,
        num_heads=1,
        item_layers=layers[0],
        service_layers=layers[1],
        mlp_ratio=ratios[0],
        head_ratio=ratios[1],
        max_tokens=sizes[0],
    )
    with torch.device("meta"):
        assert parameter_counts(config, sizes[1]) == count_parameters(Clue(config, sizes[1]))


def test_the_table_of_parts_adds_up() -> None:
    config, plan = SHAPES["one layer each"], ChunkPlan(37, 2)
    cost = step_cost(config, step_shape(make_batch(6, 13, 11, 7), plan, LossConfig()))
    title, *parts, total, padded = cost.describe().splitlines()
    assert title.split()[-4:] == ["forward", "backward", "again", "total"]
    assert [line.split()[0] for line in parts] == ["items", "histories", "head", "loss"]
    assert sum(float(line.split()[-1]) for line in parts) == pytest.approx(float(total.split()[-1]), rel=1e-3)
    assert float(total.split()[-1]) == pytest.approx(cost.total_flops / 1e9, rel=1e-3)
    assert float(padded.split()[1]) == pytest.approx(cost.padded_flops / 1e9, rel=1e-3)
