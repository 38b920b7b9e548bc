"""Longformer's layer over packed sequences: local attention in a band, and a first token that everything sees.

Source: Longformer, Beltagy et al. 2020 (arXiv 2004.05150), as transformers computes it with global attention on the
first token. Differs: the global keys and values of the first token are never made: its scores are (W_k' q) x, its value
is W_v (sum of p x).

Legend: `N` sequences, `L` length of the sequences of one group, `P` tokens of all sequences, `D` width, `A` heads,
`d` = D / A, `R` rows that are asked for.
"""

import torch
import torch.nn.functional as F
from torch import nn

from userrep.models.band_attention import Layout, attend_in_band
from userrep.models.packing import Groups


class LongformerLayer(nn.Module):
    """Post-LN transformer layer: LN(x + attention(x)), then LN(x + MLP(x))."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, window: int | None, norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_key_value = nn.Linear(dim, 3 * dim)
        if window is not None:
            self.query_global, self.key_global = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.value_global = nn.Linear(dim, dim)
        self.attention_out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim, norm_eps)
        self.mlp_in, self.mlp_out = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, norm_eps)

    def forward(self, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """All tokens, (P, D)."""
        query_PD, key_PD, value_PD = self.query_key_value(x_PD).chunk(3, dim=1)
        if layout.is_hidden is None:
            attended_PD = self._attend_fully(query_PD, key_PD, value_PD, layout.groups)
        else:
            attended_PD = self._attend_locally(query_PD, key_PD, value_PD, layout)
            attended_PD = attended_PD.index_copy(0, layout.firsts, self._attend_globally(x_PD, layout))
        return self._finish(x_PD, attended_PD)

    def forward_first(self, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The first token of each sequence alone, (N, D), equal to those rows of `forward`."""
        x_ND = x_PD[layout.firsts]
        if layout.is_hidden is not None:
            return self._finish(x_ND, self._attend_globally(x_PD, layout))
        return self._finish(x_ND, self._attend_from(x_ND, x_PD, layout))

    def forward_rows(self, x_PD: torch.Tensor, layout: Layout, rows_R: torch.Tensor) -> torch.Tensor:
        """Some tokens alone, none the first of its sequence: (R, D), equal to those rows of `forward`."""
        dim, weight, bias = x_PD.shape[1], self.query_key_value.weight, self.query_key_value.bias
        x_RD = x_PD[rows_R]
        # Queries that nobody asks for are zero: scores are cheap beside the products with D x D matrices.
        query_RD = F.linear(x_RD, weight[:dim], bias[:dim])
        query_PD = query_RD.new_zeros(len(x_PD), dim).index_copy(0, rows_R, query_RD)
        key_PD, value_PD = F.linear(x_PD, weight[dim:], bias[dim:]).chunk(2, dim=1)
        if layout.is_hidden is None:
            attended_PD = self._attend_fully(query_PD, key_PD, value_PD, layout.groups)
        else:
            attended_PD = self._attend_locally(query_PD, key_PD, value_PD, layout)
        return self._finish(x_RD, attended_PD[rows_R])

    def _finish(self, x_RD: torch.Tensor, attended_RD: torch.Tensor) -> torch.Tensor:
        x_RD = self.attention_norm(x_RD + self.attention_out(attended_RD))
        return self.mlp_norm(x_RD + self.mlp_out(F.gelu(self.mlp_in(x_RD))))

    def _attend_locally(
        self, query_PD: torch.Tensor, key_PD: torch.Tensor, value_PD: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        query, key, value = (part.unflatten(1, (self.num_heads, -1)) for part in (query_PD, key_PD, value_PD))
        return attend_in_band(query, key, value, layout).flatten(1)

    def _attend_globally(self, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """What the first token of each sequence gathers from all of its tokens, by projections of its own. (N, D)."""
        dim = x_PD.shape[1]
        head_dim = dim // self.num_heads
        query_NAd = self.query_global(x_PD[layout.firsts]).unflatten(1, (self.num_heads, head_dim)) * head_dim**-0.5
        key_AdD = self.key_global.weight.unflatten(0, (self.num_heads, head_dim))
        # The bias of the keys adds the same to all scores of a query.
        shift_NA = torch.einsum("nad,ad->na", query_NAd, self.key_global.bias.unflatten(0, (self.num_heads, -1)))
        probe_NAD = torch.einsum("nad,adk->nak", query_NAd, key_AdD)
        sizes, gathered = [count for count, _ in layout.groups.shapes], []
        for x_NLD, probe, shift in zip(
            layout.groups.split(x_PD), probe_NAD.split(sizes), shift_NA.split(sizes), strict=True
        ):
            score_NAL = probe @ x_NLD.to(probe.dtype).transpose(1, 2) + shift[..., None]
            gathered.append(score_NAL.softmax(dim=2).to(probe.dtype) @ x_NLD.to(probe.dtype))
        value_AdD = self.value_global.weight.unflatten(0, (self.num_heads, head_dim))
        value_NAd = torch.einsum("nak,adk->nad", torch.cat(gathered), value_AdD)
        return (value_NAd.flatten(1) + self.value_global.bias).to(probe_NAD.dtype)

    def _attend_fully(
        self, query_PD: torch.Tensor, key_PD: torch.Tensor, value_PD: torch.Tensor, groups: Groups
    ) -> torch.Tensor:
        parts = []
        for query_NLD, key_NLD, value_NLD in zip(*map(groups.split, (query_PD, key_PD, value_PD)), strict=True):
            parts.append(self._attention(query_NLD, key_NLD, value_NLD).flatten(0, 1))
        return torch.cat(parts)

    def _attend_from(self, x_ND: torch.Tensor, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Full attention of the first tokens alone. (N, D)."""
        dim, weight, bias = x_PD.shape[1], self.query_key_value.weight, self.query_key_value.bias
        query_ND = F.linear(x_ND, weight[:dim], bias[:dim])
        key_PD, value_PD = F.linear(x_PD, weight[dim:], bias[dim:]).chunk(2, dim=1)
        sizes, parts = [count for count, _ in layout.groups.shapes], []
        keys, values = layout.groups.split(key_PD), layout.groups.split(value_PD)
        for query_nD, key_NLD, value_NLD in zip(query_ND.split(sizes), keys, values, strict=True):
            parts.append(self._attention(query_nD[:, None], key_NLD, value_NLD)[:, 0])
        return torch.cat(parts)

    def _attention(self, query_NLD: torch.Tensor, key_NLD: torch.Tensor, value_NLD: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (query_NLD, key_NLD, value_NLD)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
