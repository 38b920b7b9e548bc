"""Which positions of left-padded sequences a stack of causal dilated convolutions has to compute, and from which.

Two kinds of work are left out, and the result is the same:
- What only pads have gone into is equal in all sequences, so it is computed once, in a sequence of pads alone.
- Where only the last position is asked for, a layer computes what that position depends on.

Positions of a layer are kept flat: those of sequence 0, then 1, ..., last the sequence of pads.
"""

from dataclasses import dataclass

import numpy as np
import torch

KERNEL_SIZE = 3  # a position reads itself and those one and two dilations before it


@dataclass(frozen=True)
class CausalLayer:
    """One convolution.

    Attributes:
        taps: flat input positions that each output position reads, oldest first, int64 (N_out, KERNEL_SIZE); counted
            from 1, 0 stands for a position before the sequence.
        kept: flat input position of each output position, int64 (N_out,).
    """

    taps: torch.Tensor
    kept: torch.Tensor


@dataclass(frozen=True)
class CausalPlan:
    """All convolutions of a stack on one batch.

    Attributes:
        items: item ids at the positions that the first layer reads, int64 (N_in,).
        layers: one per convolution.
        output: flat output position of each asked-for position, int64 (B,) or (B, L).
    """

    items: torch.Tensor
    layers: tuple[CausalLayer, ...]
    output: torch.Tensor


def plan_causal(items_BL: torch.Tensor, dilations: tuple[int, ...], last_only: bool) -> CausalPlan:
    """Plans a batch.

    Args:
        items_BL: item ids, left-padded with 0, int64 (B, L).
        dilations: of each convolution, in order.
        last_only: ask for the last position of every sequence; False: for all of them.
    """
    items = items_BL.cpu().numpy()
    num_rows, length = items.shape
    is_pad = np.logical_and.accumulate(items == 0, axis=1)
    times = [np.arange(length) >= (length - 1 if last_only else 0)]
    for dilation in reversed(dilations):
        times.insert(0, _reads(times[0], dilation))
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    for needed in times:
        # Without a change of what is needed the layer before has the same table.
        is_same = tables and needed.sum() == tables[-1][0].any(axis=0).sum()
        tables.append(tables[-1] if is_same else _table(is_pad, needed))
    layers: list[CausalLayer] = []
    known: dict[tuple[int, int, int], CausalLayer] = {}
    for (_, before), (after, _), dilation in zip(tables[:-1], tables[1:], dilations, strict=True):
        key = (id(before), id(after), dilation)
        if key not in known:
            known[key] = _layer(before, after, dilation, items_BL.device)
        layers.append(known[key])
    needed, places = tables[0]
    with_pads = np.vstack([items, np.zeros((1, length), dtype=items.dtype)])
    output = tables[-1][1][:num_rows] - 1
    return CausalPlan(
        items=torch.from_numpy(with_pads[needed]).to(items_BL.device),
        layers=tuple(layers),
        output=torch.from_numpy(output[:, -1] if last_only else output).to(items_BL.device),
    )


def _reads(needed: np.ndarray, dilation: int) -> np.ndarray:
    """Times that a convolution reads to compute the needed ones, bool (L,)."""
    reads = needed.copy()
    for distance in range(dilation, KERNEL_SIZE * dilation, dilation):
        reads[: max(0, len(needed) - distance)] |= needed[distance:]
    return reads


def _table(is_pad: np.ndarray, needed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which positions of all sequences and of the pads are computed, and where each of them is found, counted from 1.

    Both (B + 1, L), the last row being the sequence of pads.
    """
    is_computed = np.vstack([~is_pad, is_pad.any(axis=0)]) & needed
    places = np.cumsum(is_computed).reshape(is_computed.shape)
    places[:-1] = np.where(is_pad, places[-1], places[:-1])
    return is_computed, places


def _layer(before: np.ndarray, after: np.ndarray, dilation: int, device: torch.device) -> CausalLayer:
    rows, times = np.nonzero(after)
    distances = dilation * np.arange(KERNEL_SIZE - 1, -1, -1)
    sources = times[:, None] - distances
    taps = np.where(sources >= 0, before[rows[:, None], np.maximum(sources, 0)], 0)
    return CausalLayer(torch.from_numpy(taps).to(device), torch.from_numpy(taps[:, -1] - 1).to(device))
