"""Attention in a band over packed sequences: a token sees its neighbours, and the first token of its sequence.

All sequences stand one after another in a single stream, so nothing is padded; blocks of queries meet the keys around
them, and a mask keeps sequences apart. Only queries, keys, values and weights are kept for the backward pass.

Source: Longformer, Beltagy et al. 2020 (arXiv 2004.05150, section 3). Differs: a block of queries meets the keys of its
band alone, where transformers computes chunks of twice the band.

Legend: `N` sequences, `P` tokens of all sequences, `A` heads, `d` width of a head, `K` blocks, `Q` queries of a block,
`B` keys that a block meets.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from userrep.models.packing import Groups

QUERY_BLOCK = 32  # tokens; with a window of 64 a block meets 96 keys, 1.5 times the band (benchmarks/recformer_step.py)


@dataclass(frozen=True)
class Layout:
    """Where sequences lie in the stream, and which keys a query may see. One serves all layers.

    Attributes:
        groups: how many sequences have which length; the sequences are sorted by length.
        firsts: position of the first token of each sequence in the stream, (N,).
        sequences: sequence of each token, (P,).
        indices: place of each token in its sequence, (P,).
        is_hidden: keys that a query must not see in its band, the first tokens among them, (K, Q, B); None without a
            window.
    """

    groups: Groups
    firsts: torch.Tensor
    sequences: torch.Tensor
    indices: torch.Tensor
    is_hidden: torch.Tensor | None

    @property
    def reach(self) -> int:
        """Neighbours that a token sees on either side."""
        assert self.is_hidden is not None
        return (self.is_hidden.shape[2] - self.is_hidden.shape[1]) // 2


def lay_out(groups: Groups, window: int | None, device: torch.device) -> Layout:
    """Layout of sequences that are sorted by length.

    Args:
        groups: how many sequences have which length.
        window: a token sees so many / 2 tokens on either side; None: all of its sequence.
        device: of the stream.
    """
    borders = groups.borders(device).long()
    first_N, lengths_N = borders[:-1], borders.diff()
    sequence_P = torch.repeat_interleave(torch.arange(len(first_N), device=device), lengths_N)
    index_P = torch.arange(len(sequence_P), device=device) - first_N[sequence_P]
    hidden = None if window is None else _hidden(sequence_P, index_P, window // 2)
    return Layout(groups, first_N, sequence_P, index_P, hidden)


def _hidden(sequence_P: torch.Tensor, index_P: torch.Tensor, reach: int) -> torch.Tensor:
    num_blocks = -(-len(index_P) // QUERY_BLOCK)
    tail = num_blocks * QUERY_BLOCK - len(index_P)
    # No sequence at both ends: what stands there is seen by nobody. The first tokens have a column of their own.
    of_key_P = sequence_P.masked_fill(index_P == 0, -1)
    key_sequence = F.pad(of_key_P, (reach, reach + tail), value=-1).unfold(0, QUERY_BLOCK + 2 * reach, QUERY_BLOCK)
    query_sequence = F.pad(sequence_P, (0, tail), value=-2).view(num_blocks, QUERY_BLOCK)
    query = torch.arange(QUERY_BLOCK, device=index_P.device)[:, None]
    key = torch.arange(QUERY_BLOCK + 2 * reach, device=index_P.device) - reach
    is_far = (query - key).abs() > reach
    return is_far | (query_sequence[:, :, None] != key_sequence[:, None, :])


def attend_in_band(
    query_PAd: torch.Tensor, key_PAd: torch.Tensor, value_PAd: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """One softmax over the first token of the sequence and the others in the band, (P, A, d).

    Args:
        query_PAd: not scaled; what comes of first tokens' queries means nothing.
        key_PAd: keys, of the same precision.
        value_PAd: values, of the same precision.
        layout: with a window.
    """
    return _BandAttention.apply(query_PAd, key_PAd, value_PAd, layout)


class _BandAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_PAd: torch.Tensor, key_PAd: torch.Tensor, value_PAd: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        assert layout.is_hidden is not None
        num_tokens, dtype, reach = len(query_PAd), query_PAd.dtype, layout.reach
        with torch.autocast(query_PAd.device.type, enabled=False):
            scaled_PAd = query_PAd * query_PAd.shape[2] ** -0.5
            first_key, first_value = _of_firsts(key_PAd, layout), _of_firsts(value_PAd, layout)
            first_PA1 = (scaled_PAd * first_key).sum(dim=2, keepdim=True)
            score_KAQB = _blocks(scaled_PAd) @ _blocks(key_PAd, reach).transpose(2, 3)
            score_KAQB.masked_fill_(layout.is_hidden[:, None], -torch.inf)
            both = torch.cat((_blocks(first_PA1), score_KAQB), dim=3)
            both = both.softmax(dim=3, dtype=torch.promote_types(dtype, torch.float32)).to(dtype)
            band_PAd = _stream(both[..., 1:] @ _blocks(value_PAd, reach), num_tokens)
            out_PAd = band_PAd.addcmul_(_stream(both[..., :1], num_tokens), first_value)
        ctx.save_for_backward(query_PAd, key_PAd, value_PAd, both)
        ctx.layout = layout
        return out_PAd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        query_PAd, key_PAd, value_PAd, both = ctx.saved_tensors
        layout, grad_PAd, num_tokens = ctx.layout, grads[0], len(query_PAd)
        reach, scale, wide = layout.reach, query_PAd.shape[2] ** -0.5, torch.promote_types(both.dtype, torch.float32)
        scaled_PAd, grad_KAQd = query_PAd * scale, _blocks(grad_PAd)
        first_key, first_value = _of_firsts(key_PAd, layout), _of_firsts(value_PAd, layout)
        weight_PA1 = _stream(both[..., :1], num_tokens)

        grad_first = _blocks((grad_PAd * first_value).sum(dim=2, keepdim=True))
        grad_both = torch.cat((grad_first, grad_KAQd @ _blocks(value_PAd, reach).transpose(2, 3)), dim=3)
        # Of the softmax: p (g - sum of p g).
        grad_both = torch.ops.aten._softmax_backward_data(grad_both.to(wide), both.to(wide), 3, wide).to(both.dtype)
        grad_PA1, grad_KAQB = _stream(grad_both[..., :1], num_tokens), grad_both[..., 1:]

        grad_query = _stream(grad_KAQB @ _blocks(key_PAd, reach), num_tokens).addcmul_(grad_PA1, first_key).mul_(scale)
        grad_key = _add_up(grad_KAQB.transpose(2, 3) @ _blocks(scaled_PAd), reach, num_tokens)
        _add_to_firsts(grad_key, grad_PA1 * scaled_PAd, layout)
        grad_value = _add_up(both[..., 1:].transpose(2, 3) @ grad_KAQd, reach, num_tokens)
        _add_to_firsts(grad_value, weight_PA1 * grad_PAd, layout)
        return grad_query, grad_key, grad_value, None


def _of_firsts(x_PAd: torch.Tensor, layout: Layout) -> torch.Tensor:
    """For each token, what the first one of its sequence has."""
    return x_PAd[layout.firsts][layout.sequences]


def _add_to_firsts(x_PAd: torch.Tensor, added_PAd: torch.Tensor, layout: Layout) -> None:
    """Adds the sum over each sequence to its first token, in place; sums are of float32 at least."""
    wide = torch.promote_types(x_PAd.dtype, torch.float32)
    sum_NAd = added_PAd.new_zeros((len(layout.firsts), *added_PAd.shape[1:]), dtype=wide)
    sum_NAd.index_add_(0, layout.sequences, added_PAd.to(wide))
    x_PAd[layout.firsts] += sum_NAd.to(x_PAd.dtype)


def _num_shifts(reach: int) -> int:
    # A block and its surroundings are so many shifted copies of the stream side by side.
    return -(-(QUERY_BLOCK + 2 * reach) // QUERY_BLOCK)


def _blocks(x_PAd: torch.Tensor, reach: int = 0) -> torch.Tensor:
    """Blocks of the stream with `reach` tokens around each, zeros beyond the ends: (K, A, Q + 2 reach, d)."""
    num_blocks, num_shifts = -(-len(x_PAd) // QUERY_BLOCK), _num_shifts(reach)
    tail = (num_blocks + num_shifts - 1) * QUERY_BLOCK - reach - len(x_PAd)
    padded = F.pad(x_PAd, (0, 0, 0, 0, reach, tail))
    return torch.cat(_shifted(padded, num_blocks, reach), dim=1).transpose(1, 2)


def _shifted(padded: torch.Tensor, num_blocks: int, reach: int) -> list[torch.Tensor]:
    """Views (K, up to Q, A, d) of a padded stream, which side by side are the blocks with their surroundings."""
    num_shifts = _num_shifts(reach)
    views = [
        padded.narrow(0, shift * QUERY_BLOCK, num_blocks * QUERY_BLOCK).unflatten(0, (num_blocks, QUERY_BLOCK))
        for shift in range(num_shifts)
    ]
    views[-1] = views[-1].narrow(1, 0, QUERY_BLOCK + 2 * reach - (num_shifts - 1) * QUERY_BLOCK)
    return views


def _add_up(x_KABd: torch.Tensor, reach: int, num_tokens: int) -> torch.Tensor:
    """The transpose of `_blocks`: adds up what several blocks have for the same token, (P, A, d)."""
    num_blocks = len(x_KABd)
    padded = x_KABd.new_zeros(((num_blocks + _num_shifts(reach) - 1) * QUERY_BLOCK, x_KABd.shape[1], x_KABd.shape[3]))
    start = 0
    for view in _shifted(padded, num_blocks, reach):
        view += x_KABd[:, :, start : start + view.shape[1]].transpose(1, 2)
        start += view.shape[1]
    return padded[reach : reach + num_tokens]


def _stream(x_KAQd: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Blocks without surroundings as the stream that they are, (P, A, d)."""
    return x_KAQd.transpose(1, 2).flatten(0, 1)[:num_tokens]
