"""Optimizer and learning-rate schedule, both pure functions of the config and the step."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.layers import PositionEmbedding


class OptimConfig(Config):
    """AdamW with linear warm-up and cosine decay.

    Source: schedule and betas as in LMRec (arXiv 2212.03760, appendix A), by CLUE's first authors.
    Differs: token embeddings have a learning rate of their own; no decay on them, on vectors and on scalars.
    """

    learning_rate: float = Field(default=5e-4, gt=0)  # matrices, vectors and scalars
    embedding_learning_rate: float = Field(default=5e-3, gt=0)  # token and position embeddings
    weight_decay: float = Field(default=0.01, ge=0)  # decoupled; of matrices alone
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.98, ge=0, lt=1)
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)  # of all steps
    bag_steps: int = Field(default=0, ge=0)  # first steps without transformer blocks, see `training/objective.py`
    block_warmup_steps: int = Field(default=100, ge=1)  # after them: second warm-up of everything but the embeddings
    final_fraction: float = Field(default=0.01, ge=0, le=1)  # of the peak learning rate, at the last step
    max_grad_norm: float = Field(default=1.0, gt=0)


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with three groups: embeddings, matrices, and vectors or scalars."""
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
    return torch.optim.AdamW(described, betas=(config.beta1, config.beta2), foreach=True)


def learning_rate_factor(step: int, num_steps: int, config: OptimConfig) -> float:
    """Fraction of the peak learning rate at a step, counted from 0: linear warm-up, then cosine to `final_fraction`."""
    warmup = config.warmup_fraction * num_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1.0, num_steps - 1 - warmup)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, num_steps: int, config: OptimConfig) -> None:
    """Sets every group to its peak times the schedule; matrices and vectors warm up again when the blocks come in."""
    factor = learning_rate_factor(step, num_steps, config)
    steps_with_blocks = step + 1 - config.bag_steps
    is_second_warmup = config.bag_steps > 0 and steps_with_blocks > 0
    block_factor = min(1.0, steps_with_blocks / config.block_warmup_steps) if is_second_warmup else 1.0
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor * (1.0 if group["role"] == "embedding" else block_factor)
