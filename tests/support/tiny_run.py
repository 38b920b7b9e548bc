"""A run of tiny global batches, without Ray: states, batches, steps."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from userrep.data.batch import UserBatch
from userrep.losses.gather import rank, world_size
from userrep.models.clue import Clue, ClueConfig
from userrep.training.checkpoint import Snapshot, write_checkpoint
from userrep.training.fence import Attempt, start_attempt, take_over
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.state import TrainState, train_step

USERS = 8
OPTIM = OptimConfig(learning_rate=1e-2, embedding_learning_rate=2e-2, bag_steps=2, block_warmup_steps=2)


def make_state(dtype: torch.dtype = torch.float64) -> TrainState:
    torch.manual_seed(0)
    model = Clue(ClueConfig(dim=8, num_heads=2), vocab_size=30).to(dtype)
    return TrainState(model=model, optimizer=build_optimizer(model, OPTIM), seed=3)


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
        user_keys=(mine + 100 * (step + 1)).astype(np.int64),
        service_pairs=np.zeros(len(mine), dtype=np.int64),
        item_keys=np.arange(len(tokens)),
        step=step,
    )


def run_steps(
    state: TrainState, stop: int, num_steps: int, objective: torch.nn.Module | None = None
) -> list[dict[str, float]]:
    """Metrics of the steps up to `stop` of a run of `num_steps`, on the ranks that there are."""
    objective = objective or ClueObjective(state.model, OPTIM.bag_steps)
    return [
        train_step(objective, state, make_batch(step, world_size(), rank()), OPTIM, num_steps)
        for step in range(state.step, stop)
    ]


def weights(state: TrainState) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in state.model.state_dict().items()}


def new_attempt(run_dir: Path, job: str = "job") -> Attempt:
    take_over(run_dir, job)
    return start_attempt(run_dir, job, lambda: None)


def save(attempt: Attempt, state: TrainState, recall: float | None = 0.0, keep: int = 100) -> Path:
    """Commits a checkpoint, with a validation result or without."""
    metrics: dict[str, Any] = {"train/loss": 1.0} if recall is None else {"val/recall_at_10": recall}
    config = {"seed": state.seed}
    return write_checkpoint(attempt.run_dir / "checkpoints", Snapshot.take(state), config, metrics, keep, attempt)
