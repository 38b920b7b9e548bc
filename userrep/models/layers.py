"""Transformer over packed ragged sequences, without padding.

Legend: `N` sequences, `L` length of the sequences of one group, `P` positions of all sequences one after another,
`D` width, `A` heads, `d` = D / A.
"""

import torch
import torch.nn.functional as F
from torch import nn

from userrep.models.backbone import Adapter
from userrep.models.packing import Groups

BLOCK_POINTS = 2  # mask points of a block: what attention adds, and what the MLP adds


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

    def forward(self, x_PD: torch.Tensor, groups: Groups, adapt: Adapter | None = None) -> torch.Tensor:
        """Args: x_PD sequences sorted by length; groups how many have which length; adapt of points 0 and 1. (P, D)."""
        qkv_PX = self.query_key_value(self.attention_norm(x_PD))
        if can_attend_ragged(qkv_PX):
            attended_PD = self._attend_ragged(qkv_PX, groups)
        else:
            attended_PD = torch.cat([self._attend(qkv_NLX) for qkv_NLX in groups.split(qkv_PX)])
        added_PD = self.attention_out(attended_PD)
        x_PD = x_PD + (added_PD if adapt is None else adapt(0, added_PD))
        added_PD = self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x_PD))))
        return x_PD + (added_PD if adapt is None else adapt(1, added_PD))

    def _attend(self, qkv_NLX: torch.Tensor) -> torch.Tensor:
        qkv_3NALd = qkv_NLX.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_NALd, key_NALd, value_NALd = qkv_3NALd.unbind(0)
        # A single position attends to itself alone: the result is its value.
        is_single = qkv_NLX.shape[1] == 1
        out_NALd = value_NALd if is_single else F.scaled_dot_product_attention(query_NALd, key_NALd, value_NALd)
        return out_NALd.transpose(1, 2).reshape(-1, qkv_NLX.shape[2] // 3)

    def _attend_ragged(self, qkv_PX: torch.Tensor, groups: Groups) -> torch.Tensor:
        # Imported here: it takes torch's compiler along, 1.4 CPU-s in every process of a cluster.
        from torch.nn.attention.varlen import varlen_attn

        query_PAd, key_PAd, value_PAd = qkv_PX.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        borders, longest = groups.borders(qkv_PX.device), groups.shapes[-1][1]
        return varlen_attn(query_PAd, key_PAd, value_PAd, borders, borders, longest, longest).flatten(1)


def can_attend_ragged(values: torch.Tensor) -> bool:
    """Whether one kernel attends within all sequences at once: on CUDA, in half precision. Else: group by group."""
    return values.is_cuda and values.dtype in (torch.bfloat16, torch.float16)


class Transformer(nn.Module):
    """Stack of blocks that maps ragged sequences to the mean of their last hidden vectors."""

    def __init__(self, dim: int, num_layers: int, num_heads: int, mlp_dim: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_dim) for _ in range(num_layers))

    def forward(
        self, x_PD: torch.Tensor, groups: Groups, use_blocks: bool = True, adapt: Adapter | None = None
    ) -> torch.Tensor:
        """Encodes packed sequences, equally long ones together; the same as encoding each by itself.

        Args:
            x_PD: positions of all sequences one after another, sorted by length.
            groups: how many sequences have which length.
            use_blocks: False leaves the blocks out, which changes nothing while their output matrices are zero.
            adapt: called with what every block adds, points 2 l and 2 l + 1 of block l.

        Returns:
            (N, D), the mean over each sequence's positions.
        """
        if use_blocks:
            for number, block in enumerate(self.blocks):
                x_PD = block(x_PD, groups, None if adapt is None else _of_block(adapt, number))
        return mean_of_sequences(x_PD, groups)


def _of_block(adapt: Adapter, number: int) -> Adapter:
    return lambda point, added_PD: adapt(BLOCK_POINTS * number + point, added_PD)


def mean_of_sequences(x_PD: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Mean over the positions of each sequence, (N, D)."""
    return torch.cat([x_NLD.mean(dim=1) for x_NLD in groups.split(x_PD)])


class PositionEmbedding(nn.Module):
    """Learned vectors added by position within a sequence; positions beyond the last one share it. Starts at zero."""

    def __init__(self, num_positions: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_positions, dim))

    def forward(self, groups: Groups) -> torch.Tensor:
        """(P, D), one vector per position of the sequences of the groups."""
        parts = []
        for count, length in groups.shapes:
            position_L = torch.arange(length, device=self.weight.device).clamp(max=len(self.weight) - 1)
            parts.append(F.embedding(position_L, self.weight).repeat(count, 1))
        return torch.cat(parts)
