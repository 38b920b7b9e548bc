"""One optimizer step of a method of continual learning, on all ranks together. No Ray in here.

Legend: `B` samples of a batch, `L` positions of a history.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from userrep.continual.method import Method, Progress
from userrep.data.tasks import PAD, ItemSequences, Task
from userrep.losses.gather import all_gather, gather_sizes, rank, sum_over_ranks, world_size

Optimizers = tuple[torch.optim.Optimizer, ...]  # of a phase, each with parameters of its own


def open_optimizers(method: Method, learning_rate: float) -> Optimizers:
    """Adam of what is trained in the current phase, and where embeddings have sparse gradients, SparseAdam of those.

    Source: Sein-Kim/TERACON@b48e074: betas .9 and .999, eps 1e-8, no weight decay. Differs: masks have a learning rate
    of their own. Rows of a sparse table that no sample of a batch reads neither move nor have their moments decay,
    where Adam goes on moving them; and SparseAdam adds eps to the root of the second moment before the correction of
    its bias, not after it, so what has gradients below 1e-6 moves less in the first steps.

    Args:
        method: after `begin_phase`.
        learning_rate: of all but masks.
    """
    tables = {id(m.weight) for m in method.modules() if isinstance(m, nn.Embedding) and m.sparse}
    groups = method.parameter_groups(learning_rate)

    def chosen(is_table: bool) -> list[dict[str, Any]]:
        parts = ([p for p in group["params"] if (id(p) in tables) == is_table] for group in groups)
        return [group | {"params": part} for group, part in zip(groups, parts, strict=True) if part]

    dense, sparse = chosen(False), chosen(True)
    adam = torch.optim.Adam(dense, fused=True)
    return (adam, torch.optim.SparseAdam(sparse)) if sparse else (adam,)


def take_step(
    method: Method,
    optimizers: Optimizers,
    task: Task,
    sequences: ItemSequences,
    samples: np.ndarray,
    progress: Progress,
) -> dict[str, float]:
    """Takes a step, unless a metric is not finite. A collective over all ranks.

    Args:
        method: whose parameters are trained; the same on every rank.
        optimizers: of the phase, from `open_optimizers`.
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
    for optimizer in optimizers:
        optimizer.zero_grad()
    (loss * share).backward()
    values = {"train/loss": loss.item(), **facts}
    tables, dense = [], []
    for optimizer in optimizers:
        kind = tables if isinstance(optimizer, torch.optim.SparseAdam) else dense
        kind += [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sums = _sum_over_ranks(dense, [share * value for value in values.values()])
    metrics = dict(zip(values, sums, strict=True))
    gradients = [parameter.grad for parameter in dense if parameter.grad is not None]
    gradients += [_sum_rows_over_ranks(table) for table in tables]
    metrics["train/grad_norm"] = nn.utils.get_total_norm(gradients).item()
    if all(map(math.isfinite, metrics.values())):
        method.before_step(progress)
        for optimizer in optimizers:
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


def _sum_rows_over_ranks(table: nn.Parameter) -> torch.Tensor:
    """Sums the sparse gradient of a table over ranks, in place; what is sent are its rows. A collective.

    Returns:
        The rows of the sum that are not left out, (N, D), each of another row of the table.
    """
    assert table.grad is not None  # every loss reads items
    grad = table.grad.coalesce()
    if world_size() > 1:
        rows, values = grad.indices()[0], grad.values()
        sizes = gather_sizes(len(rows), rows.device)
        rows, values = all_gather(rows, sizes), all_gather(values, sizes)
        grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=False).coalesce()
    table.grad = grad
    return grad.values()
