"""Two towers over the features of items: queries and candidates in one space, compared by their cosine.

Source: Yao et al., "Self-supervised Learning for Large-scale Item Recommendations", CIKM 2021 (arXiv 2007.12865,
sections 3 and 4): features are embedded and concatenated, an MLP with ReLU follows, embedding tables are shared.

Decisions that the paper leaves open:
- The query is an item too, so both towers read the same features through the same tables; the MLPs are their own.
- A feature with several values is embedded as their mean, so that dropping values does not change the scale.
- A masked feature, and one that the item lacks, is a learned default vector of the feature.
- A dense feature is one number beside the vectors; its default is a learned number that starts at 0, the mean.
- The temperature is constant, or learned where the config says so.

Legend: `N` items, `V` values of a feature, `E` width of its embedding, `D` width of the result.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.item_frequency import FrequencyConfig, ItemFrequency

Values = tuple[torch.Tensor, torch.Tensor]  # of one feature: ids int64 (V,) or numbers (V,); borders int64 (N + 1,)


@dataclass(frozen=True)
class FeatureTable:
    """What an embedding of a feature has to know.

    Attributes:
        num_ids: rows of the table; 0 for a dense feature.
        dim: width of the embedding; a dense feature is one number.
    """

    num_ids: int
    dim: int


class TwoTowerConfig(Config):
    """Shape of the towers."""

    hidden_dims: tuple[int, ...] = Field(default=(1024, 128), min_length=1)  # of either tower; the last is the result's
    shares_towers: bool = False  # one MLP for queries and items
    temperature: float = Field(default=0.07, ge=0.01, le=10)
    learns_temperature: bool = False
    frequency: FrequencyConfig = FrequencyConfig()


class FeatureEmbedding(nn.Module):
    """Mean of the vectors of a feature's values; a default vector where there is none."""

    def __init__(self, table: FeatureTable) -> None:
        super().__init__()
        self.dim = table.dim if table.num_ids else 1
        # A plain table, looked up by `F.embedding_bag`, so that it counts and learns as the other tables do.
        self.values = nn.Embedding(table.num_ids, table.dim) if table.num_ids else None
        self.default = nn.Parameter(torch.zeros(self.dim))
        if self.values is not None:
            nn.init.normal_(self.values.weight, std=table.dim**-0.5)
            nn.init.normal_(self.default, std=table.dim**-0.5)

    def forward(self, values_V: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """(N, E)."""
        is_present_N1 = (offsets.diff() > 0)[:, None]
        if self.values is None:
            found_N1 = self.default.new_zeros(len(offsets) - 1, 1)
            found_N1[is_present_N1[:, 0], 0] = values_V.to(self.default.dtype)  # at most one number each
            return torch.where(is_present_N1, found_N1, self.default)
        found_NE = F.embedding_bag(values_V, self.values.weight, offsets, mode="mean", include_last_offset=True)
        return torch.where(is_present_N1, found_NE, self.default)


class TwoTower(nn.Module):
    """Both towers, the temperature, and the estimated frequencies of items."""

    def __init__(self, config: TwoTowerConfig, tables: Sequence[FeatureTable]) -> None:
        """Random initialisation from torch's global generator.

        Args:
            config: shape.
            tables: of the features, in the order in which they are given to the towers.

        Raises:
            ValueError: there is no feature.
        """
        super().__init__()
        if not tables:
            raise ValueError("a two-tower model without features: name at least one")
        self.config, self.dim = config, config.hidden_dims[-1]
        embeddings = [FeatureEmbedding(table) for table in tables]
        self.embeddings = nn.ModuleList(embeddings)
        input_dim = sum(embedding.dim for embedding in embeddings)
        self.query_tower = _tower(input_dim, config.hidden_dims)
        self.item_tower = self.query_tower if config.shares_towers else _tower(input_dim, config.hidden_dims)
        log_scale = torch.tensor(-math.log(config.temperature))
        self.logit_scale = nn.Parameter(log_scale, requires_grad=config.learns_temperature)
        self.frequency = ItemFrequency(config.frequency)

    def embed(self, features: Sequence[Values]) -> torch.Tensor:
        """Input of either tower, (N, sum of E), from the values of every feature.

        A step calls it once for everything that it encodes: every call makes a gradient as large as the tables.
        """
        embedded = [embed(*values) for embed, values in zip(self.embeddings, features, strict=True)]
        return torch.cat(embedded, dim=1)

    def encode_queries(self, embedded_NX: torch.Tensor) -> torch.Tensor:
        """Query vectors (N, D), L2 norm 1, from the result of `embed`."""
        return F.normalize(self.query_tower(embedded_NX), dim=-1)

    def encode_items(self, embedded_NX: torch.Tensor) -> torch.Tensor:
        """Item vectors (N, D), L2 norm 1, from the result of `embed`."""
        return F.normalize(self.item_tower(embedded_NX), dim=-1)


def _tower(input_dim: int, hidden_dims: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in zip([input_dim, *hidden_dims], hidden_dims, strict=False):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
