"""All-gather with a gradient, and the one convention for gradients of a loss over all workers.

Convention: every rank returns the mean loss of its own rows; the backward of `all_gather` SUMS the gradients of all
ranks; data parallelism then takes the MEAN over ranks. The result is the exact gradient of the mean over all rows.
Averaging in the gather, or keeping only the local slice, scales or falsifies the gradient (tests hold the difference).
"""

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this process; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates equally shaped tensors of all ranks along dimension 0, in rank order, with gradient.

    A collective: every rank must call it equally often, in the same order.

    Args:
        rows: (B, ...), the same shape on every rank.

    Returns:
        (W * B, ...); its backward gives each rank the sum over ranks of the gradients of its rows.
    """
    if world_size() == 1:
        return rows
    return _AllGather.apply(rows)


def all_gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates tensors whose first dimensions differ between ranks, in rank order, without gradient."""
    if world_size() == 1:
        return rows
    sizes = torch.tensor([len(rows) if r == rank() else 0 for r in range(world_size())], device=rows.device)
    dist.all_reduce(sizes)
    padded = rows.new_zeros((int(sizes.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows.detach()
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)])


def sum_over_ranks(values: torch.Tensor) -> None:
    """Adds up equally shaped tensors of all ranks, in place, without gradient. A collective."""
    if world_size() > 1:
        dist.all_reduce(values)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        # all-reduce + slice instead of reduce-scatter, which gloo lacks; W times the traffic, the same sum.
        total = grads[0].contiguous().clone()
        sum_over_ranks(total)
        return total[rank() * ctx.num_rows : (rank() + 1) * ctx.num_rows]
