"""CLUE: item text -> item vector -> user vector, trained by agreement of a user's two views.

Source: Shin et al., "Scaling Law for Recommendation Models", AAAI 2023 (arXiv 2111.11294), section 3: the Item
Transformer reads the tokens of an item, the item vector is the mean over tokens; the Service Transformer reads the
item vectors of a history, the user vector is the mean over items.

Decisions that the paper's readable sources leave open:
- One Item Transformer and one Service Transformer serve all services: text is the common language, and a history of
  a service that was never trained can be encoded.
- Token positions are learned embeddings that start at zero. Histories have no positions: with them the encoder learns
  to tell how long a history is, and the two halves of a cut history are equally long. On amazon2014 that alone lifted
  recall@10 from .47 to .55 and said nothing about interests (pipelines/records/LOG.md).
- Blocks are pre-LN and start as the identity (`models/layers.py`), and token embeddings start as random vectors whose
  lengths are the tokens' inverse document frequencies: a new encoder is a random projection of TF-IDF.
- A residual two-layer head after the pooling, which starts at zero; its output, L2-normalised, is the representation.
- Temperature: learned, initialised at 0.07 as in CLIP, clipped at 0.01. The bias of logits is used by the sigmoid loss
  alone.

Legend: `U` unique items, `T` their tokens, `H` histories, `E` their events, `D` width.
"""

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.models.backbone import Adapter
from userrep.models.layers import BLOCK_POINTS, PositionEmbedding, Transformer
from userrep.models.packing import Groups

LOGIT_BIAS_INIT = -10.0  # SigLIP (arXiv 2303.15343, section 3.1): at first nearly all pairs are negatives


class ClueConfig(Config):
    """Shape of the encoder."""

    dim: int = Field(default=128, ge=1)
    item_layers: int = Field(default=1, ge=0)
    service_layers: int = Field(default=1, ge=0)
    num_heads: int = Field(default=4, ge=1)
    mlp_ratio: int = Field(default=1, ge=1)  # hidden width of a block's MLP over dim
    head_ratio: int = Field(default=2, ge=1)  # hidden width of the head over dim
    max_tokens: int = Field(default=32, ge=1)  # longest item that has token positions of its own
    token_std: float = Field(default=0.3, gt=0)  # of the initial token embeddings, before inverse document frequencies
    temperature_init: float = Field(default=0.07, gt=0.01, lt=10)


class UserEncoder(nn.Module):
    """Service Transformer and head: from the item vectors of a history to a user vector.

    Attributes:
        num_points: mask points: what attention and MLP of every block add, and what the head adds.
    """

    def __init__(self, config: ClueConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_points = BLOCK_POINTS * config.service_layers + 1
        self.service_transformer = Transformer(dim, config.service_layers, config.num_heads, config.mlp_ratio * dim)
        self.head_norm = nn.LayerNorm(dim)
        self.head_in = nn.Linear(dim, config.head_ratio * dim)
        self.head_out = nn.Linear(config.head_ratio * dim, dim)
        nn.init.zeros_(self.head_out.weight)
        nn.init.zeros_(self.head_out.bias)

    def forward(
        self, event_ED: torch.Tensor, groups: Groups, use_blocks: bool = True, adapt: Adapter | None = None
    ) -> torch.Tensor:
        """User vectors (H, D), of any length.

        Args:
            event_ED: item vectors of histories sorted by length, one history after another.
            groups: how many histories have which length.
            use_blocks: as in `Clue.encode_items`.
            adapt: called with the output of every mask point.
        """
        pooled_HD = self.service_transformer(event_ED, groups, use_blocks, adapt)
        added_HD = self.head_out(F.gelu(self.head_in(self.head_norm(pooled_HD))))
        return pooled_HD + (added_HD if adapt is None else adapt(self.num_points - 1, added_HD))


class Clue(nn.Module):
    """The encoder and its temperature."""

    def __init__(self, config: ClueConfig, vocab_size: int, idf_V: torch.Tensor | None = None) -> None:
        """Random initialisation from torch's global generator.

        Args:
            config: shape.
            vocab_size: tokens of the tokenizer.
            idf_V: inverse document frequency of each token, by which its initial vector is scaled; default: all equal.
        """
        super().__init__()
        dim, mlp_dim = config.dim, config.mlp_ratio * config.dim
        self.config, self.dim = config, dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.token_position = PositionEmbedding(config.max_tokens, dim)
        self.item_transformer = Transformer(dim, config.item_layers, config.num_heads, mlp_dim)
        self.user_encoder = UserEncoder(config)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(config.temperature_init)))
        self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS_INIT))
        nn.init.normal_(self.token_embedding.weight, std=config.token_std)
        if idf_V is not None:
            self.token_embedding.weight.data *= (idf_V / idf_V.mean())[:, None]

    def encode_items(self, tokens_T: torch.Tensor, groups: Groups, use_blocks: bool = True) -> torch.Tensor:
        """Item vectors (U, D).

        Args:
            tokens_T: token ids of items sorted by length, one item after another.
            groups: how many items have which length.
            use_blocks: False leaves all transformer blocks out; for a new encoder the result is the same.
        """
        token_TD = self.token_embedding(tokens_T) + self.token_position(groups)
        return self.item_transformer(token_TD, groups, use_blocks)

    def encode_histories(
        self, item_UD: torch.Tensor, history_items_E: torch.Tensor, groups: Groups, use_blocks: bool = True
    ) -> torch.Tensor:
        """User vectors (H, D), L2 norm 1.

        Args:
            item_UD: item vectors.
            history_items_E: references to them, of histories sorted by length, one history after another.
            groups: how many histories have which length.
            use_blocks: as in `encode_items`.
        """
        return F.normalize(self.user_encoder(F.embedding(history_items_E, item_UD), groups, use_blocks), dim=-1)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by role: `embedding` (tables) and `non_embedding` (the N of scaling laws), and `total`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    embedding = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding | PositionEmbedding)
    )
    return {"embedding": embedding, "non_embedding": total - embedding, "total": total}
