"""Optimizer and learning-rate schedule, both pure functions of the config and the step."""

import math
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.layers import PositionEmbedding


class OptimConfig(Config):
    """Optimizer with linear warm-up, and cosine decay or a constant rate with a decay at the end.

    Source: cosine schedule and betas as in LMRec (arXiv 2212.03760, appendix A), by CLUE's first authors; `wsd`
    (warm-up, stable, decay) from MiniCPM (arXiv 2404.06395, section 4), its decay by the square root from Hagele et al.
    2024 (arXiv 2405.18392, section 3).
    Differs: token embeddings have a learning rate of their own; no decay on them, on vectors and on scalars.
    """

    algorithm: Literal["adamw", "adagrad"] = "adamw"  # adagrad has neither betas nor weight decay
    learning_rate: float = Field(default=5e-4, gt=0)  # matrices, vectors and scalars
    embedding_learning_rate: float = Field(default=5e-3, gt=0)  # token and position embeddings
    weight_decay: float = Field(default=0.01, ge=0)  # decoupled; of matrices alone
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    # wsd: up to its decay, a run is the same however long it is to be; so one long run has shorter ones on its way.
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)  # cosine: of all steps
    warmup_steps: int = Field(default=50, ge=0)  # wsd
    decay_fraction: float = Field(default=0.2, gt=0, le=1)  # wsd: last steps, of all
    bag_steps: int = Field(default=0, ge=0)  # first steps without transformer blocks, see `training/objective.py`
    block_warmup_steps: int = Field(default=100, ge=1)  # after them: second warm-up of everything but the embeddings
    final_fraction: float = Field(default=0.01, ge=0, le=1)  # of the peak learning rate, at the last step
    max_grad_norm: float = Field(default=1.0, gt=0)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer with three groups: embeddings, matrices, and vectors or scalars."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding | PositionEmbedding)}
    groups: dict[str, list[nn.Parameter]] = {"embedding": [], "matrix": [], "vector": []}
    for parameter in model.parameters():
        role = "embedding" if id(parameter) in tables else "matrix" if parameter.ndim >= 2 else "vector"
        groups[role].append(parameter)
    peaks = {
        "embedding": config.embedding_learning_rate,
        "matrix": config.learning_rate,
        "vector": config.learning_rate,
    }
    decays = {"embedding": 0.0, "matrix": config.weight_decay, "vector": 0.0}
    described: list[dict[str, Any]] = [
        {"params": parameters, "role": role, "peak_lr": peaks[role], "lr": peaks[role], "weight_decay": decays[role]}
        for role, parameters in groups.items()
        if parameters
    ]
    if config.algorithm == "adagrad":
        return torch.optim.Adagrad([{**group, "weight_decay": 0.0} for group in described], foreach=True)
    # One pass over the memory: a fifth of the time of `foreach` on CPU, where the tables of a vocabulary are large.
    return torch.optim.AdamW(described, betas=(config.beta1, config.beta2), fused=True)


def learning_rate_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at a step, counted from 0: linear warm-up, then a fall to `final_fraction`."""
    if config.schedule == "wsd":
        start = decay_start(num_steps, config)
        progress = max(0.0, (step + 1 - start) / (num_steps - start))
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        return warm * (config.final_fraction + (1 - config.final_fraction) * (1 - math.sqrt(progress)))
    warmup = config.warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, num_steps - 1 - warmup)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def decay_start(num_steps: int, config: OptimConfig) -> int:
    """Steps of a `wsd` run before its learning rate decays; at least the last step is decayed."""
    return num_steps - max(1, round(config.decay_fraction * num_steps))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimConfig) -> None:
    """Sets every group to its peak times the schedule; matrices and vectors warm up again when the blocks come in."""
    factor = learning_rate_factor(step, num_steps, config)
    steps_with_blocks = step + 1 - config.bag_steps
    is_second_warmup = config.bag_steps > 0 and steps_with_blocks > 0
    block_factor = min(1.0, steps_with_blocks / config.block_warmup_steps) if is_second_warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * (1.0 if group["role"] == "embedding" else block_factor)
