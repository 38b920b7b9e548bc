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


def gather_sizes(num_rows: int, device: torch.device | None = None) -> tuple[int, ...]:
    """How many rows every rank has, in rank order. A collective."""
    return tuple(all_gather(torch.tensor([num_rows], device=device)).tolist())


def all_gather(rows: torch.Tensor, sizes: tuple[int, ...] | None = None) -> torch.Tensor:
    """Concatenates tensors of all ranks along dimension 0, in rank order, with gradient.

    A collective: every rank must call it equally often, in the same order.

    Args:
        rows: (B, ...), the same shape on every rank but for B.
        sizes: B of every rank, as `gather_sizes` gives it; default: the same on every rank.

    Returns:
        (sum of B, ...); its backward gives each rank the sum over ranks of the gradients of its rows.
    """
    if world_size() == 1:
        return rows
    return _AllGather.apply(rows, sizes or (len(rows),) * world_size())


def all_gather_uneven(rows: torch.Tensor) -> torch.Tensor:
    """Concatenates tensors whose first dimensions differ between ranks, in rank order, without gradient."""
    return all_gather(rows.detach(), gather_sizes(len(rows), rows.device))


def sum_over_ranks(values: torch.Tensor) -> None:
    """Adds up equally shaped tensors of all ranks, in place, without gradient. A collective."""
    if world_size() > 1:
        dist.all_reduce(values)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        ctx.sizes = sizes
        # gloo gathers nothing but equal shapes, so the shorter ones are padded.
        missing = max(sizes) - len(rows)
        padded = torch.cat((rows, rows.new_zeros(missing, *rows.shape[1:]))) if missing else rows.contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:  # pyright: ignore
        # all-reduce + slice instead of reduce-scatter, which gloo lacks; W times the traffic, the same sum.
        total = grads[0].contiguous().clone()
        sum_over_ranks(total)
        start = sum(ctx.sizes[: rank()])
        return total[start : start + ctx.sizes[rank()]], None
