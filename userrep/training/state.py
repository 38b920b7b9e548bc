"""Everything that a run needs to go on, and one optimizer step. No Ray in here."""

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from userrep.data.batch import UserBatch
from userrep.losses.contrastive import MAX_LOGIT_SCALE
from userrep.losses.gather import all_gather, rank
from userrep.training.objective import user_keys
from userrep.training.optim import OptimConfig, learning_rate_factor, set_learning_rates

Model = TypeVar("Model", bound=nn.Module)


class NonFiniteLossError(RuntimeError):
    """A loss or a gradient is NaN or infinite on some rank; no rank took the optimizer step.

    Attributes:
        evidence: JSON-plain: the step, what every rank computed, and the user keys of the global batch.
    """

    def __init__(self, message: str, evidence: dict[str, Any]) -> None:
        super().__init__(message, evidence)
        self.evidence = evidence

    def __str__(self) -> str:
        """The message alone."""
        return str(self.args[0])


@dataclass
class TrainState(Generic[Model]):
    """Progress of a run: all that a resumed run needs, on any number of workers.

    The learning rate and the position in the plan are functions of `step`. So is the state of torch's random generator
    of every rank: a step starts by seeding it with (seed, step, rank). A resumed run therefore draws the same numbers,
    whatever was drawn between two steps; where the number of ranks has changed, ranks that both runs have draw the same
    numbers as before and new ranks draw their own.

    Attributes:
        model: the module whose parameters are trained, without any data-parallel wrapper. Its `logit_scale`, the log
            of an inverse temperature, is a parameter or a buffer.
        optimizer: over the parameters of `model`.
        seed: of everything that is drawn in a step.
        step: optimizer steps taken.
        samples_seen: samples consumed by them, over all workers.
        batch_hash: rolling hash over the user keys of all global batches, in order; independent of the world size.
        time_s: unix time of rank 0 in the last step of this process, the same number on all ranks, so that they agree
            on what is due; no part of the progress.
    """

    model: Model
    optimizer: torch.optim.Optimizer
    seed: int = 0
    step: int = 0
    samples_seen: int = 0
    batch_hash: str = ""
    time_s: float = 0.0

    def progress(self) -> dict[str, Any]:
        """The JSON-plain part of the state."""
        return {name: getattr(self, name) for name in ("seed", "step", "samples_seen", "batch_hash")}

    def set_progress(self, progress: dict[str, Any]) -> None:
        """Inverse of `progress`."""
        self.seed, self.step = progress["seed"], progress["step"]
        self.samples_seen, self.batch_hash = progress["samples_seen"], progress["batch_hash"]


def train_step(
    objective: nn.Module, state: TrainState[Any], batch: UserBatch, config: OptimConfig, num_steps: int
) -> dict[str, float]:
    """Takes one optimizer step on a global batch. A collective over all workers.

    Args:
        objective: returns the mean loss of this worker's rows and metrics of its batch; data-parallel wrapped when
            there are several workers.
        state: advanced in place.
        batch: this worker's rows of the global batch number `state.step`; workers may have different numbers of them.
        config: optimizer settings.
        num_steps: length of the run, for the schedule.

    Returns:
        Metrics of the global batch: `train/loss`, `train/grad_norm`, `train/learning_rate_factor`, `train/users`, and
        those of the objective, mean over the workers.

    Raises:
        NonFiniteLossError: on every rank, when the loss or the gradient of any rank is not finite.
    """
    torch.manual_seed(_seed_of_rank(state))
    set_learning_rates(state.optimizer, state.step, num_steps, config)
    loss, facts = objective(batch)
    loss.backward()
    # Data parallelism has averaged the gradients, so the norm is the same number on every rank.
    grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), config.max_grad_norm).item()
    mine = [loss.item(), grad_norm, len(batch.user_keys), time.time(), *facts.values()]
    columns = all_gather(torch.tensor([mine], dtype=torch.float64, device=loss.device)).T.tolist()
    losses, grad_norms, sizes, times = columns[:4]
    keys_G = all_gather(user_keys(batch, loss.device), tuple(map(int, sizes))).cpu().numpy()
    if not all(map(math.isfinite, losses + grad_norms)):
        raise _non_finite(state.step, losses, grad_norms, keys_G)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():  # beyond the clip it would have no gradient, and never come back
        state.model.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    state.batch_hash = hashlib.blake2b(state.batch_hash.encode() + keys_G.tobytes(), digest_size=16).hexdigest()
    state.samples_seen += len(keys_G)
    state.step += 1
    state.time_s = times[0]
    return {
        "train/loss": _mean(losses),
        "train/grad_norm": grad_norm,
        "train/learning_rate_factor": learning_rate_factor(state.step - 1, num_steps, config),
        "train/users": float(len(keys_G)),
        **{name: _mean(values) for name, values in zip(facts, columns[4:], strict=True)},
    }


def _seed_of_rank(state: TrainState) -> int:
    return int(np.random.SeedSequence([state.seed, state.step, rank()]).generate_state(1, np.uint64)[0])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _non_finite(step: int, losses: list[float], grad_norms: list[float], keys_G: np.ndarray) -> NonFiniteLossError:
    # NaN and infinity are no JSON numbers.
    ranks = [{"loss": str(loss), "grad_norm": str(norm)} for loss, norm in zip(losses, grad_norms, strict=True)]
    culprits = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    where = f"on rank {', '.join(map(str, culprits))}" if culprits else "on no rank"
    message = (
        f"step {step}: the loss is not finite {where} of {len(losses)} (mean {_mean(losses)}, gradient norm "
        f"{grad_norms[0]}); no rank took the step. Lower pretrain.optim.learning_rate, or look at the batch's users"
    )
    return NonFiniteLossError(message, {"step": step, "ranks": ranks, "user_keys": keys_G.tolist()})
