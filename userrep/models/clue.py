"""CLUE: item text -> item vector -> user vector, trained by agreement of a user's two views.

Source: Shin et al., "Scaling Law for Recommendation Models", AAAI 2023 (arXiv 2111.11294), section 3: the Item
Transformer reads the tokens of an item, the item vector is the mean over tokens; the Service Transformer reads the
item vectors of a history, the user vector is the mean over items.

Decisions that the paper's readable sources leave open:
- One Item Transformer and one Service Transformer serve all services: text is the common language, and a history of
  a service that was never trained can be encoded.
- Position embeddings are learned, for tokens and for history slots counted from the latest event; they start at zero.
- Blocks are pre-LN with zero-initialised outputs (`models/layers.py`), so training starts from the mean of the
  token embeddings, which already retrieves better than chance.
- No projection after the pooling; the contrastive vector is the representation itself, L2-normalised.
- Temperature: learned, initialised at 0.07 as in CLIP, clipped at 0.01.

Legend: `U` unique items, `T` their tokens, `H` histories, `E` their events, `D` width.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.layers import PositionEmbedding, Transformer


class ClueConfig(Config):
    """Shape of the encoder."""

    dim: int = Field(128, ge=1)
    item_layers: int = Field(1, ge=0)
    service_layers: int = Field(1, ge=0)
    num_heads: int = Field(4, ge=1)
    mlp_ratio: int = Field(4, ge=1)
    max_tokens: int = Field(32, ge=1)  # longest item that has token positions of its own
    max_events: int = Field(64, ge=1)  # longest history that has slot positions of its own
    temperature_init: float = Field(0.07, gt=0.01, lt=10)


class Clue(nn.Module):
    """The encoder and its temperature."""

    def __init__(self, config: ClueConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.token_embedding = nn.Embedding(vocab_size, config.dim)
        self.token_position = PositionEmbedding(config.max_tokens, config.dim)
        self.item_transformer = Transformer(config.dim, config.item_layers, config.num_heads, config.mlp_ratio)
        self.slot_position = PositionEmbedding(config.max_events, config.dim)
        self.service_transformer = Transformer(config.dim, config.service_layers, config.num_heads, config.mlp_ratio)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature_init)))
        nn.init.normal_(self.token_embedding.weight)

    def encode_items(self, tokens_T: torch.Tensor, token_offsets: torch.Tensor) -> torch.Tensor:
        """Item vectors (U, D) of packed item tokens; token_offsets (U + 1,)."""
        token_TD = self.token_embedding(tokens_T) + self.token_position(token_offsets)
        return self.item_transformer(token_TD, token_offsets)

    def encode_histories(
        self, item_UD: torch.Tensor, history_items_E: torch.Tensor, history_offsets: torch.Tensor
    ) -> torch.Tensor:
        """User vectors (H, D), L2-normalised, of histories that refer to item vectors; history_offsets (H + 1,)."""
        event_ED = F.embedding(history_items_E, item_UD) + self.slot_position(history_offsets)
        return F.normalize(self.service_transformer(event_ED, history_offsets).float(), dim=-1)

    def forward(
        self,
        tokens_T: torch.Tensor,
        token_offsets: torch.Tensor,
        history_items_E: torch.Tensor,
        history_offsets: torch.Tensor,
    ) -> torch.Tensor:
        """User vectors (H, D), L2 norm 1, of all histories of a batch; every unique item is encoded once."""
        item_UD = self.encode_items(tokens_T, token_offsets)
        return self.encode_histories(item_UD, history_items_E, history_offsets)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by role: `embedding` (tables) and `non_embedding` (the N of scaling laws), and `total`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding | PositionEmbedding))
    return {"embedding": embedding, "non_embedding": total - embedding, "total": total}
