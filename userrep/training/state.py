"""Everything that a run needs to go on, and one optimizer step. No Ray in here."""

import hashlib
import math
from dataclasses import dataclass, field

import torch
from torch import nn

from userrep.data.batch import UserBatch
from userrep.losses.contrastive import MAX_LOGIT_SCALE
from userrep.losses.gather import all_gather, world_size
from userrep.training.encoding import Encoder
from userrep.training.objective import user_keys
from userrep.training.optim import OptimConfig, learning_rate_factor, set_learning_rates


class NonFiniteLossError(RuntimeError):
    """The loss or a gradient is NaN or infinite; the optimizer step was not taken."""


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        model: the module whose parameters are trained, without any data-parallel wrapper.
        optimizer: over the parameters of `model`.
        step: optimizer steps taken.
        samples_seen: samples consumed by them, over all workers.
        batch_hash: rolling hash over the user keys of all global batches, in order; independent of the world size.
    """

    model: Encoder
    optimizer: torch.optim.AdamW
    step: int = 0
    samples_seen: int = 0
    batch_hash: str = field(default="")

    def progress(self) -> dict[str, int | str]:
        """The JSON-plain part of the state."""
        return {"step": self.step, "samples_seen": self.samples_seen, "batch_hash": self.batch_hash}


def train_step(
    objective: nn.Module, state: TrainState, batch: UserBatch, config: OptimConfig, num_steps: int
) -> dict[str, float]:
    """Takes one optimizer step on a global batch. A collective over all workers.

    Args:
        objective: returns the mean loss of this worker's rows and metrics of its batch; data-parallel wrapped when
            there are several workers.
        state: advanced in place.
        batch: this worker's rows of the global batch number `state.step`.
        config: optimizer settings.
        num_steps: length of the run, for the schedule.

    Returns:
        Metrics of the global batch: `train/loss`, `train/grad_norm`, `train/learning_rate_factor`, `train/users`, and
        those of the objective, mean over the workers.

    Raises:
        NonFiniteLossError: on every rank, when the loss of any rank or the gradient is not finite.
    """
    set_learning_rates(state.optimizer, state.step, num_steps, config)
    loss, facts = objective(batch)
    loss.backward()
    # Data parallelism has averaged the gradients, so the norm is the same number on every rank.
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm).item()
    mine = torch.tensor([loss.item(), *facts.values()], dtype=torch.float64, device=loss.device)
    global_loss, *means = all_gather(mine[None]).mean(dim=0).tolist()
    if not math.isfinite(global_loss + grad_norm):
        raise NonFiniteLossError(
            f"step {state.step}: loss {global_loss}, gradient norm {grad_norm}; no step was taken. "
            "Lower pretrain.optim.learning_rate, or resume from the last checkpoint with another seed"
        )
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # beyond the clip it would have no gradient, and never come back
        state.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    keys_G = all_gather(user_keys(batch, loss.device)).cpu().numpy()
    state.batch_hash = hashlib.blake2b(state.batch_hash.encode() + keys_G.tobytes(), digest_size=16).hexdigest()
    state.samples_seen += len(batch.user_keys) * world_size()
    state.step += 1
    return {
        "train/loss": global_loss,
        "train/grad_norm": grad_norm,
        "train/learning_rate_factor": learning_rate_factor(state.step - 1, num_steps, config),
        "train/users": float(len(batch.user_keys) * world_size()),
        **dict(zip(facts, means, strict=True)),
    }
