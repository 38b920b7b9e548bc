"""Optimizer steps: schedule, world-size independence, going on from every step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.tiny_run import OPTIM, USERS, make_batch, make_state, new_attempt, run_steps, save, weights
from userrep.data.batch import UserBatch
from userrep.losses.gather import rank, world_size
from userrep.training.checkpoint import latest_checkpoint, list_checkpoints, restore_checkpoint
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, learning_rate_factor, set_learning_rates
from userrep.training.state import NonFiniteLossError, TrainState, train_step

NUM_STEPS = 6


class Noisy(torch.nn.Module):
    """An objective that draws random numbers, as dropout would."""

    def __init__(self, objective: torch.nn.Module) -> None:
        super().__init__()
        self.objective = objective
        self.drawn: list[float] = []

    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, facts = self.objective(batch)
        noise = torch.rand(())
        self.drawn.append(noise.item())
        return loss * (0.5 + noise), facts


def noisy(state: TrainState) -> Noisy:
    return Noisy(ClueObjective(state.model, OPTIM.bag_steps))


def test_stopped_after_every_step_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    num_steps = 30
    attempt, whole = new_attempt(tmp_path), make_state(torch.float32)
    objective = noisy(whole)
    losses = []
    for step in range(num_steps):
        save(attempt, whole)
        torch.rand(step)  # what is drawn between two steps is of no influence
        losses += run_steps(whole, step + 1, num_steps, objective)
    assert len(set(objective.drawn)) == num_steps
    for checkpoint in list_checkpoints(tmp_path / "checkpoints"):
        resumed = make_state(torch.float32)
        torch.nn.init.normal_(
            resumed.model.user_encoder.head_in.weight
        )  # what is restored must not depend on what was there
        resumed.seed = 0
        restore_checkpoint(checkpoint, resumed)
        first = resumed.step
        assert run_steps(resumed, num_steps, num_steps, noisy(resumed)) == losses[first:]
        assert resumed.progress() == whole.progress()
        for name, value in weights(resumed).items():
            assert torch.equal(value, weights(whole)[name]), name


def parallel(state: TrainState, **kwargs: Any) -> torch.nn.Module:
    objective = ClueObjective(state.model, OPTIM.bag_steps, **kwargs)
    if world_size() == 1:
        return objective
    return torch.nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)


def _ranks_run(_rank: int) -> tuple[dict[str, torch.Tensor], list[float], dict[str, Any]]:
    state = make_state()
    # In chunks here, in one piece there: neither the workers nor the chunks make a difference.
    metrics = run_steps(state, NUM_STEPS, NUM_STEPS, parallel(state, memory=MemoryConfig(chunk_size=5)))
    return weights(state), [point["train/loss"] for point in metrics], state.progress()


def test_three_workers_with_unequal_parts_take_the_same_steps_as_one() -> None:
    assert USERS % 3
    alone = make_state()
    losses = [point["train/loss"] for point in run_steps(alone, NUM_STEPS, NUM_STEPS)]
    for rank_weights, rank_losses, progress in run_ranks(_ranks_run, 3):
        assert rank_losses == pytest.approx(losses, rel=1e-10)
        assert progress == alone.progress()  # the same global batches, in the same order
        for name, value in rank_weights.items():
            torch.testing.assert_close(value, weights(alone)[name], rtol=1e-7, atol=1e-9)


def _go_on(_rank: int, run_dir: Path, stop: int) -> tuple[list[float], dict[str, Any]]:
    state = make_state(torch.float32)
    if (checkpoint := latest_checkpoint(run_dir / "checkpoints")) is not None:
        restore_checkpoint(checkpoint, state)
    metrics = run_steps(state, stop, NUM_STEPS, parallel(state))
    if rank() == 0:
        save(new_attempt(run_dir), state)
    return [point["train/loss"] for point in metrics], state.progress()


def test_a_run_goes_on_with_another_number_of_workers(tmp_path: Path) -> None:
    alone = make_state(torch.float32)
    expected = [point["train/loss"] for point in run_steps(alone, NUM_STEPS, NUM_STEPS)]
    losses = run_ranks(_go_on, 2, tmp_path, 2)[0][0]
    losses += _go_on(0, tmp_path, 3)[0]
    for rank_losses, progress in run_ranks(_go_on, 3, tmp_path, NUM_STEPS):
        assert losses + rank_losses == pytest.approx(expected, rel=1e-5)
        assert progress == alone.progress()


def test_training_lowers_the_loss() -> None:
    state = make_state()
    objective = ClueObjective(state.model)
    optim = OptimConfig(learning_rate=1e-2, embedding_learning_rate=2e-2, warmup_fraction=0)
    batch = make_batch(0)
    losses = [train_step(objective, state, batch, optim, 40)["train/loss"] for _ in range(40)]
    assert losses[-1] < 0.2 * losses[0]


class Poisoned(torch.nn.Module):
    """An objective whose loss on the last rank is infinite in step 2."""

    def __init__(self, objective: torch.nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        loss, facts = self.objective(batch)
        is_bad = batch.step == 2 and rank() == world_size() - 1
        return loss * float("inf") if is_bad else loss, facts


def _poisoned_run(_rank: int) -> tuple[str, dict[str, Any], bool, dict[str, Any]]:
    state = make_state()
    objective = torch.nn.parallel.DistributedDataParallel(
        Poisoned(ClueObjective(state.model, OPTIM.bag_steps)), find_unused_parameters=True
    )
    run_steps(state, 2, NUM_STEPS, objective)
    before = weights(state)
    with pytest.raises(NonFiniteLossError) as caught:
        run_steps(state, 3, NUM_STEPS, objective)
    is_unchanged = all(torch.equal(value, before[name]) for name, value in weights(state).items())
    return str(caught.value), caught.value.evidence, is_unchanged, state.progress()


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_step() -> None:
    alone = make_state()
    run_steps(alone, 2, NUM_STEPS)
    by_rank = run_ranks(_poisoned_run, 2)
    for message, evidence, is_unchanged, progress in by_rank:
        assert message.startswith("step 2: the loss is not finite on rank 1 of 2")
        assert evidence == by_rank[0][1]
        assert evidence["step"] == 2
        assert evidence["user_keys"] == list(range(300, 300 + USERS))
        assert [facts["loss"] == "inf" for facts in evidence["ranks"]] == [False, True]
        assert is_unchanged
        assert progress == alone.progress()


def test_a_gradient_that_is_not_finite_takes_no_step() -> None:
    state = make_state()
    state.model.user_encoder.head_in.weight.register_hook(lambda gradient: gradient * float("nan"))
    before = weights(state)["user_encoder.head_in.weight"]
    with pytest.raises(NonFiniteLossError, match="step 0: the loss is not finite on no rank of 1"):
        run_steps(state, 1, NUM_STEPS)
    assert state.step == 0
    assert torch.equal(weights(state)["user_encoder.head_in.weight"], before)


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
