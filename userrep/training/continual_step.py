"""One optimizer step of a method of continual learning, on all ranks together. No Ray in here.

Legend: `B` samples of a batch, `L` positions of a history.
"""

import math
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from userrep.continual.method import Method, Progress
from userrep.data.tasks import PAD, ItemSequences, Task
from userrep.losses.gather import rank, sum_over_ranks, world_size


def take_step(
    method: Method,
    optimizer: torch.optim.Optimizer,
    task: Task,
    sequences: ItemSequences,
    samples: np.ndarray,
    progress: Progress,
) -> dict[str, float]:
    """Takes a step, unless a metric is not finite. A collective over all ranks.

    Args:
        method: whose parameters `optimizer` has; the same on every rank.
        optimizer: of the phase.
        task: that the batch is of.
        sequences: of all users.
        samples: positions in the task of the whole batch, (B,), of which this rank takes its part.
        progress: of the phase; the method is also told the rows of its part.

    Returns:
        `train/loss` and the method's own metrics, means over the batch, and `train/grad_norm`; the same on every rank.
        One that is not finite says that no rank has taken the step.
    """
    part, share = own_part(task, sequences, samples, rank(), world_size())
    device = next(method.parameters()).device
    rows = task.rows[part]
    items_BL = torch.from_numpy(sequences.items[rows]).long().to(device)
    labels_B = torch.from_numpy(task.labels[part]).to(device)
    loss, facts = method.loss(items_BL, labels_B, replace(progress, rows=torch.from_numpy(rows)))
    optimizer.zero_grad()
    (loss * share).backward()
    values = {"train/loss": loss.item(), **facts}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sums = _sum_over_ranks(parameters, [share * value for value in values.values()])
    metrics = dict(zip(values, sums, strict=True))
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    metrics["train/grad_norm"] = nn.utils.get_total_norm(gradients).item()
    if all(map(math.isfinite, metrics.values())):
        method.before_step(progress)
        optimizer.step()
        method.after_step()
    return metrics


def own_part(
    task: Task, sequences: ItemSequences, samples: np.ndarray, rank: int, world_size: int
) -> tuple[np.ndarray, float]:
    """A rank's part of a batch, [r B // W, (r + 1) B // W), and its share of the batch's mean loss; shares sum to 1.

    A rank without samples gets one with a share of 0: methods take note of their steps, so all ranks take all of them.
    """
    start, stop = (end * len(samples) // world_size for end in (rank, rank + 1))
    if start == stop:
        return samples[:1], 0.0
    part = samples[start:stop]
    return part, _num_predictions(task, sequences, part) / _num_predictions(task, sequences, samples)


def _num_predictions(task: Task, sequences: ItemSequences, samples: np.ndarray) -> int:
    """How many predictions the mean loss of samples is over."""
    if task.kind != "next_item":
        return len(samples)
    return int((sequences.items[task.rows[samples], 1:] != PAD).sum())


def _sum_over_ranks(parameters: list[nn.Parameter], values: list[float]) -> list[float]:
    """Sums gradients, in place, and values over ranks, in one message.

    A parameter that has no gradient on any rank has none afterwards: an optimizer passes it over, whereas it would go
    on moving one with a gradient of zero.
    """
    if world_size() == 1:
        return values
    has_grad = [float(parameter.grad is not None) for parameter in parameters]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor(has_grad + values)])
    sum_over_ranks(flat)
    *sums, flags, totals = flat.split([*(grad.numel() for grad in grads), len(has_grad), len(values)])
    for parameter, total, flag in zip(parameters, sums, flags.tolist(), strict=True):
        parameter.grad = total.view_as(parameter).clone() if flag else None
    return totals.tolist()
