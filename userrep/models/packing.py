"""Ragged sequences without padding: sorted by length, so that equally long ones stand together, and cut into chunks.

Legend: `N` sequences, `P` positions of all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch


@dataclass(frozen=True)
class Groups:
    """Shape of consecutive sequences sorted by length: (number of sequences, their common length) of each group."""

    shapes: tuple[tuple[int, int], ...]

    @cached_property
    def num_positions(self) -> list[int]:
        """Positions in each group."""
        return [count * length for count, length in self.shapes]

    def split(self, x_PX: torch.Tensor) -> Iterator[torch.Tensor]:
        """The groups as views (sequences, length, X)."""
        # One split, not slices: the gradient of k slices is k tensors of full size.
        parts = x_PX.split(self.num_positions)
        return (part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True))

    def borders(self, device: torch.device) -> torch.Tensor:
        """Borders of the sequences in their positions, int32 (N + 1,)."""
        counts, lengths = np.array(self.shapes).T
        borders = np.concatenate(([0], np.repeat(lengths, counts).cumsum()))
        return torch.from_numpy(borders.astype(np.int32)).to(device)


@dataclass(frozen=True)
class Chunk:
    """Some consecutive sorted sequences, which are encoded together."""

    sequences: slice
    positions: slice
    groups: Groups


@dataclass(frozen=True)
class Pack:
    """Order and chunks of ragged sequences.

    Attributes:
        order: the sequences sorted by length, int64 (N,).
        positions: original position of each position of the sorted sequences, int64 (P,).
        chunks: consecutive parts that hold every sorted sequence once.
    """

    order: np.ndarray
    positions: np.ndarray
    chunks: tuple[Chunk, ...]


def pack(offsets: np.ndarray, chunk_size: int | None = None) -> Pack:
    """Sorts sequences by length and cuts them into chunks.

    Args:
        offsets: borders of the sequences, (N + 1,); none is empty.
        chunk_size: most positions of a chunk, >= 1; a longer sequence is a chunk of its own. Default: no limit. Chunks
            are about equally large.
    """
    lengths = np.diff(offsets).astype(np.int64)
    order = np.argsort(lengths, kind="stable")
    lengths = lengths[order]
    ends = lengths.cumsum()
    starts = ends - lengths
    positions = np.arange(ends[-1]) + np.repeat(offsets[:-1][order] - starts, lengths)
    num_positions = int(ends[-1])
    if chunk_size is None:
        chunk_size = num_positions
    # So many chunks there must be; equal ones would hold that much, up to what is left of a sequence at the border.
    equal_size = -(-num_positions // -(-num_positions // chunk_size)) + int(lengths[-1]) - 1
    chunk_size = min(chunk_size, equal_size)
    chunks, first = [], 0
    while first < len(order):
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + chunk_size, side="right")))
        values, counts = np.unique(lengths[first:last], return_counts=True)
        groups = Groups(tuple(zip(counts.tolist(), values.tolist(), strict=True)))
        chunks.append(Chunk(slice(first, last), slice(int(starts[first]), int(ends[last - 1])), groups))
        first = last
    return Pack(order, positions, tuple(chunks))
