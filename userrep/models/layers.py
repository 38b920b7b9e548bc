"""Transformer over packed ragged sequences, without padding.

Legend: `N` sequences, `L` length of the sequences of one group, `P` positions of all sequences one after another,
`D` width, `A` heads, `d` = D / A.
"""

import torch
import torch.nn.functional as F
from torch import nn

Groups = list[tuple[int, int]]  # (number of sequences, their common length) of consecutive equally long sequences


class Block(nn.Module):
    """Pre-LN transformer block: x + attention(LN x), then x + MLP(LN x).

    The output matrices start at zero, so a new block is the identity, and an encoder starts as the mean of its inputs.
    Source: pre-LN as in Xiong et al. 2020 (arXiv 2002.04745); branches that start at zero as in Bachlechner et al. 2020
    (ReZero, arXiv 2003.04887). Differs: zero output matrices instead of a zero scalar gate.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.mlp_in = nn.Linear(dim, mlp_dim)
        self.mlp_out = nn.Linear(mlp_dim, dim)
        for linear in (self.query_key_value, self.mlp_in):
            nn.init.normal_(linear.weight, std=dim**-0.5)
            nn.init.zeros_(linear.bias)
        for linear in (self.attention_out, self.mlp_out):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x_PD: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Args: x_PD sequences sorted by length; groups how many have which length. Returns (P, D)."""
        qkv_P3D = self.query_key_value(self.attention_norm(x_PD))
        # split, not slices: the gradient of k slices is k tensors of full size.
        parts = zip(groups, qkv_P3D.split([count * length for count, length in groups]), strict=True)
        attended_PD = torch.cat([self._attend(qkv, count, length) for (count, length), qkv in parts])
        x_PD = x_PD + self.attention_out(attended_PD)
        return x_PD + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_PD)), approximate="tanh"))

    def _attend(self, qkv_P3D: torch.Tensor, count: int, length: int) -> torch.Tensor:
        qkv_3NALd = qkv_P3D.view(count, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query_NALd, key_NALd, value_NALd = qkv_3NALd.unbind(0)
        # A single position attends to itself alone: the result is its value.
        out_NALd = value_NALd if length == 1 else F.scaled_dot_product_attention(query_NALd, key_NALd, value_NALd)
        return out_NALd.transpose(1, 2).reshape(count * length, -1)


class Transformer(nn.Module):
    """Stack of blocks that maps ragged sequences to the mean of their last hidden vectors."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_dim) for _ in range(num_layers))

    def forward(self, x_PD: torch.Tensor, offsets: torch.Tensor, use_blocks: bool = True) -> torch.Tensor:
        """Encodes packed sequences, equally long ones together; the same as encoding each by itself.

        Args:
            x_PD: positions of all sequences one after another.
            offsets: int64 (N + 1,), borders of the sequences; none is empty.
            use_blocks: False leaves the blocks out, which changes nothing while their output matrices are zero.

        Returns:
            (N, D), the mean over each sequence's positions.
        """
        lengths_N = offsets.diff()
        if not use_blocks or not self.blocks:
            owner_P = torch.arange(len(lengths_N), device=x_PD.device).repeat_interleave(lengths_N)
            sums_ND = x_PD.new_zeros(len(lengths_N), x_PD.shape[1]).index_add(0, owner_P, x_PD)
            return sums_ND / lengths_N[:, None]
        order_N = lengths_N.argsort(stable=True)
        sorted_N = lengths_N[order_N]
        shift_N = offsets[:-1][order_N] - (sorted_N.cumsum(0) - sorted_N)
        index_P = torch.arange(len(x_PD), device=x_PD.device) + shift_N.repeat_interleave(sorted_N)
        x_PD = F.embedding(index_P, x_PD)
        lengths, counts = sorted_N.unique_consecutive(return_counts=True)
        groups = list(zip(counts.tolist(), lengths.tolist(), strict=True))
        for block in self.blocks:
            x_PD = block(x_PD, groups)
        parts = zip(groups, x_PD.split([count * length for count, length in groups]), strict=True)
        pooled_ND = torch.cat([part.view(count, length, -1).mean(dim=1) for (count, length), part in parts])
        return F.embedding(order_N.argsort(), pooled_ND)


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
