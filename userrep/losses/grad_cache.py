"""Encode a batch of any size in bounded memory, with the exact gradient of the loss over the whole batch.

Source: GradCache, Gao et al. 2021 (arXiv 2101.06983): encode without graph, take the gradient of the loss with respect
to the representations, encode again chunk by chunk with graph. Differs: activation checkpointing does the bookkeeping,
so the caller writes an ordinary forward pass, data parallelism sees an ordinary backward pass, and encoders may feed
each other; the graphs of the last chunks are kept, as many as the caller has memory for, instead of made twice.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Chunk = TypeVar("Chunk")


def encode_in_chunks(
    encode: Callable[[Chunk], torch.Tensor], chunks: Sequence[Chunk], num_kept: int = 1
) -> torch.Tensor:
    """Representations of all chunks, one after another, (N, D).

    Args:
        encode: representations of a chunk, (n, D). Called twice for all chunks but the kept ones, the second time with
            the random numbers of the first, so it may use dropout; it must not change anything.
        chunks: at least one.
        num_kept: the last so many chunks keep their graph.
    """
    if not torch.is_grad_enabled():
        return torch.cat([encode(chunk) for chunk in chunks])
    num_recomputed = max(0, len(chunks) - num_kept)
    parts = [checkpoint(encode, chunk, use_reentrant=False) for chunk in chunks[:num_recomputed]]
    return torch.cat(parts + [encode(chunk) for chunk in chunks[num_recomputed:]])


@dataclass(frozen=True)
class GraphSize:
    """Memory that a graph holds for its backward pass, parameters left out: all tensors, and the largest one."""

    total_bytes: int
    largest_bytes: int


def measure_graph(encode: Callable[[], torch.Tensor]) -> GraphSize:
    """Runs `encode` once and adds up what autograd saves: exact, the same in every run, no random number is used up.

    Under torch's FakeTensorMode nothing is allocated or computed, and the result is the same.
    """
    storages: dict[int, tuple[torch.Tensor, int]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not (isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter)):
            storage = tensor.untyped_storage()
            # The storage object, not its data: fake tensors have none. The tensor is held so that no other object gets
            # its address.
            storages[storage._cdata] = (tensor, storage.nbytes())
        return tensor

    with torch.random.fork_rng(), torch.enable_grad(), saved_tensors_hooks(note, lambda tensor: tensor):
        encode()
    sizes = [size for _, size in storages.values()]
    return GraphSize(sum(sizes), max(sizes))
