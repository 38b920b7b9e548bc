"""Transformer over packed ragged sequences.

Legend: `N` sequences, `L` padded length, `P` positions of all sequences one after another,
`S` slots of all sequences with their padding, `D` width, `A` heads.
"""

import torch
import torch.nn.functional as F
from torch import nn

BUCKET_MULTIPLE = 4  # lengths are padded up to a multiple of this: few buckets, little padding


class Block(nn.Module):
    """Pre-LN transformer block: x + attention(LN x), then x + MLP(LN x).

    The output projections start at zero, so a new block is the identity and an encoder starts as the mean of its inputs.
    Source: pre-LN as in Xiong et al. 2020 (arXiv 2002.04745); zero-initialised branches as in Bachlechner et al. 2020
    (ReZero, arXiv 2003.04887). Differs: zero output matrices instead of a zero scalar gate.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, mlp_ratio * dim)
        self.mlp_out = nn.Linear(mlp_ratio * dim, dim)
        for linear in (self.attention_out, self.mlp_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_NLD: torch.Tensor, is_real_NL: torch.Tensor | None) -> torch.Tensor:
        """Args: x_NLD padded inputs; is_real_NL False at padding, None when nothing is padded. Returns (N, L, D)."""
        N, L, D = x_NLD.shape
        qkv = self.query_key_value(self.attention_norm(x_NLD)).view(N, L, 3, self.num_heads, D // self.num_heads)
        query_NALd, key_NALd, value_NALd = qkv.permute(2, 0, 3, 1, 4)
        mask = None if is_real_NL is None else is_real_NL[:, None, None, :]
        attended = F.scaled_dot_product_attention(query_NALd, key_NALd, value_NALd, attn_mask=mask)
        x_NLD = x_NLD + self.attention_out(attended.transpose(1, 2).reshape(N, L, D))
        return x_NLD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_NLD)), approximate="tanh"))


class Transformer(nn.Module):
    """Stack of blocks that maps ragged sequences to the mean of their last hidden vectors."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(num_layers))

    def forward(self, x_PD: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Encodes packed sequences, in buckets of similar length; equal to padding all of them to the longest.

        Args:
            x_PD: positions of all sequences one after another.
            offsets: int64 (N + 1,), borders of the sequences; none is empty.

        Returns:
            (N, D), the mean over each sequence's positions.
        """
        lengths_N = offsets.diff()
        padded_N = (lengths_N + BUCKET_MULTIPLE - 1) // BUCKET_MULTIPLE * BUCKET_MULTIPLE
        order_N = padded_N.argsort(stable=True)
        bucket_lengths, bucket_sizes = padded_N[order_N].unique_consecutive(return_counts=True)
        # One gather for all buckets, then views of it: slicing the input per bucket would cost one full-size gradient each.
        slots_N = bucket_lengths.repeat_interleave(bucket_sizes)
        slot_offsets = F.pad(slots_N.cumsum(0), (1, 0))
        slot_S = torch.arange(int(slot_offsets[-1]), device=x_PD.device) - slot_offsets[:-1].repeat_interleave(slots_N)
        is_real_S = slot_S < lengths_N[order_N].repeat_interleave(slots_N)
        start_S = offsets[:-1][order_N].repeat_interleave(slots_N)
        # A padded slot repeats the sequence's first position: a valid index, masked out of attention and mean.
        x_SD = F.embedding(torch.where(is_real_S, start_S + slot_S, start_S), x_PD)

        sizes = (bucket_lengths * bucket_sizes).tolist()
        pooled = [
            self._encode_bucket(bucket_SD.view(-1, length, x_PD.shape[1]), is_real.view(-1, length))
            for bucket_SD, is_real, length in zip(
                x_SD.split(sizes), is_real_S.split(sizes), bucket_lengths.tolist(), strict=True
            )
        ]
        return F.embedding(order_N.argsort(), torch.cat(pooled))

    def _encode_bucket(self, x_NLD: torch.Tensor, is_real_NL: torch.Tensor) -> torch.Tensor:
        is_full = bool(is_real_NL.all())
        for block in self.blocks:
            x_NLD = block(x_NLD, None if is_full else is_real_NL)
        if is_full:
            return x_NLD.mean(dim=1)
        return (x_NLD * is_real_NL[:, :, None]).sum(dim=1) / is_real_NL.sum(dim=1, keepdim=True)


class PositionEmbedding(nn.Module):
    """Learned vectors added by position within a sequence; positions beyond the last one share it. Starts at zero."""

    def __init__(self, num_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_positions, dim))

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        """Args: offsets (N + 1,), borders of packed sequences. Returns (P, D), one vector per position."""
        lengths = offsets.diff()
        position_P = torch.arange(int(offsets[-1]), device=offsets.device) - offsets[:-1].repeat_interleave(lengths)
        return F.embedding(position_P.clamp(max=len(self.weight) - 1), self.weight)
