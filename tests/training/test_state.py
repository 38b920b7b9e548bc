"""Optimizer steps: schedule, world-size independence, restoring at every step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.distributed import run_ranks
from userrep.data.batch import UserBatch
from userrep.losses.gather import rank, world_size
from userrep.models.clue import Clue, ClueConfig
from userrep.training.checkpoint import (
    CheckpointMismatchError,
    best_checkpoint,
    latest_checkpoint,
    list_checkpoints,
    restore_checkpoint,
    save_checkpoint,
)
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer, learning_rate_factor, set_learning_rates
from userrep.training.state import NonFiniteLossError, TrainState, train_step

NUM_STEPS = 6
USERS = 8
OPTIM = OptimConfig(learning_rate=1e-2, embedding_learning_rate=2e-2, bag_steps=2, block_warmup_steps=2)


def make_state(dtype: torch.dtype = torch.float64) -> TrainState:
    torch.manual_seed(0)
    model = Clue(ClueConfig(dim=8, num_heads=2), vocab_size=30).to(dtype)
    return TrainState(model=model, optimizer=build_optimizer(model, OPTIM))


def make_batch(step: int, ranks: int = 1, rank_: int = 0) -> UserBatch:
    """Rank `rank_`'s rows of global batch `step`: every user has an own item per view, and one that all share."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(0, 30, size=(2 * USERS + 1, 3))
    mine = np.arange(rank_ * USERS // ranks, (rank_ + 1) * USERS // ranks)
    histories = [[0, 1 + user] for user in mine] + [[0, 1 + USERS + user] for user in mine]
    return UserBatch(
        tokens=tokens.ravel().astype(np.int32),
        token_offsets=np.arange(0, 3 * len(tokens) + 1, 3).astype(np.int32),
        history_items=np.array(histories).ravel().astype(np.int32),
        history_offsets=np.arange(0, 2 * len(histories) + 1, 2).astype(np.int32),
        user_keys=(mine + 100).astype(np.int64),
        service_pairs=np.zeros(len(mine), dtype=np.int64),
        positive_items=mine.astype(np.int64),
        step=step,
    )


def run_steps(state: TrainState, stop: int, objective: torch.nn.Module | None = None) -> list[dict[str, float]]:
    objective = objective or ClueObjective(state.model, OPTIM.bag_steps)
    return [
        train_step(objective, state, make_batch(step, world_size(), rank()), OPTIM, NUM_STEPS)
        for step in range(state.step, stop)
    ]


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def test_restored_at_every_step_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = make_state(torch.float32)
    losses = []
    for step in range(NUM_STEPS):
        save_checkpoint(tmp_path, whole, {}, {"val/recall_at_10": 0.0}, keep=NUM_STEPS)
        losses += run_steps(whole, step + 1)
    for checkpoint in list_checkpoints(tmp_path):
        resumed = make_state(torch.float32)
        torch.nn.init.normal_(resumed.model.head_in.weight)  # what is restored must not depend on what was there
        restore_checkpoint(checkpoint, resumed)
        first = resumed.step
        assert run_steps(resumed, NUM_STEPS) == losses[first:]
        assert resumed.progress() == whole.progress()
        for name, value in weights(resumed).items():
            assert torch.equal(value, weights(whole)[name]), name


def _ranks_run(_rank: int) -> tuple[dict[str, torch.Tensor], list[float], dict[str, Any]]:
    state = make_state()
    objective = torch.nn.parallel.DistributedDataParallel(
        # In chunks here, in one piece there: neither the workers nor the chunks make a difference.
        ClueObjective(state.model, OPTIM.bag_steps, memory=MemoryConfig(chunk_size=5)),
        find_unused_parameters=True,
    )
    metrics = run_steps(state, NUM_STEPS, objective)
    return weights(state), [point["train/loss"] for point in metrics], state.progress()


def test_two_workers_take_the_same_steps_as_one() -> None:
    alone = make_state()
    losses = [point["train/loss"] for point in run_steps(alone, NUM_STEPS)]
    for rank_weights, rank_losses, progress in run_ranks(_ranks_run, 2):
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        assert progress == alone.progress()  # the same global batches, in the same order
        for name, value in rank_weights.items():
            torch.testing.assert_close(value, weights(alone)[name], rtol=1e-7, atol=1e-9)


def test_training_lowers_the_loss() -> None:
    state = make_state()
    objective = ClueObjective(state.model)
    optim = OptimConfig(learning_rate=1e-2, embedding_learning_rate=2e-2, warmup_fraction=0)
    batch = make_batch(0)
    losses = [train_step(objective, state, batch, optim, 40)["train/loss"] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


def test_non_finite_loss_takes_no_step() -> None:
    state = make_state()
    state.model.token_embedding.weight.data[:] = float("nan")
    before = weights(state)["head_in.weight"]
    with pytest.raises(NonFiniteLossError, match="step 0"):
        run_steps(state, 1)
    assert state.step == 0
    assert torch.equal(weights(state)["head_in.weight"], before)


def test_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    state = make_state()
    good = save_checkpoint(tmp_path, state, {}, {"val/recall_at_10": 0.0}, keep=3)
    run_steps(state, 1)
    damaged = save_checkpoint(tmp_path, state, {}, {"val/recall_at_10": 0.0}, keep=3)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.warns(UserWarning, match="passed over"):
        assert latest_checkpoint(tmp_path) == good


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    state = make_state()
    for step, recall in enumerate((0.1, 0.4, 0.2, 0.3)):
        state.step = step
        save_checkpoint(tmp_path, state, {}, {"val/recall_at_10": recall}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000003"]
    best = best_checkpoint(tmp_path)
    assert best is not None
    assert best.name == "step-00000001"


def test_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tmp_path, make_state(), {}, {"val/recall_at_10": 0.0}, keep=1)
    model = Clue(ClueConfig(dim=16, num_heads=2), vocab_size=30)
    other = TrainState(model=model, optimizer=build_optimizer(model, OPTIM))
    with pytest.raises(CheckpointMismatchError, match="does not fit"):
        restore_checkpoint(checkpoint, other)


def test_schedule() -> None:
    config = OptimConfig(warmup_fraction=0.1, final_fraction=0.2)
    factors = [learning_rate_factor(step, 100, config) for step in range(100)]
    assert all(a < b for a, b in zip(factors[:10], factors[1:10], strict=False))
    assert max(factors) == factors[10] == 1.0
    assert all(a > b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[-1] == pytest.approx(0.2)


def test_blocks_warm_up_when_they_come_in() -> None:
    state = make_state()
    rates = []
    for step in range(NUM_STEPS):
        set_learning_rates(state.optimizer, step, NUM_STEPS, OPTIM)
        rates.append({group["role"]: group["lr"] / group["peak_lr"] for group in state.optimizer.param_groups})
    relative = [rate["matrix"] / rate["embedding"] for rate in rates]
    assert relative == pytest.approx([1, 1, 0.5, 1, 1, 1])
