"""Recformer: an item is the text of its attributes, a user the text of its items; one encoder reads both.

Source: Li et al., "Text Is All You Need", KDD 2023 (arXiv 2305.13731, section 2.2); the backbone is Longformer's (arXiv
2004.05150). Differs: no dropout; sequences are packed; the last layer is computed only where its output is asked for.

Legend: `N` sequences, `P` tokens of all sequences, `M` masked tokens, `V` vocabulary, `D` width.
"""

import math
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from userrep.config import Config
from userrep.models.band_attention import Layout, lay_out
from userrep.models.longformer import LongformerLayer
from userrep.models.packing import Groups

NUM_TYPES = 3  # [CLS], key, value
INIT_STD = 0.02  # of all matrices and embeddings, as in BERT


class RecformerConfig(Config):
    """Shape of the encoder, and what of a history it reads. The shape of a loaded backbone is the backbone's own."""

    dim: int = Field(default=128, ge=1)
    num_layers: int = Field(default=2, ge=1)
    num_heads: int = Field(default=4, ge=1)
    mlp_dim: int = Field(default=512, ge=1)
    window: int | None = Field(default=64, ge=2)  # a token sees half of it on either side; None: everything (BERT)
    max_items: int = Field(default=50, ge=1)  # of a history, the most recent ones
    max_tokens: int = Field(default=1024, ge=1)  # of a sequence with its [CLS]
    position_offset: int = Field(default=0, ge=0)  # rows of the position table before the first token's; RoBERTa has 2
    norm_eps: float = Field(default=1e-5, gt=0)
    temperature: float = Field(default=0.05, ge=0.01)  # fixed, as in the paper
    tie_embeddings: bool = False  # the language model's output matrix is the token embedding; not so in official code

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}: change one of them")
        if self.window is not None and self.window % 2:
            raise ValueError(f"window {self.window} is odd, and one half of it lies on either side: make it even")
        return self


class LanguageModelHead(nn.Module):
    """From hidden vectors to what the output matrix turns into logits: LN(GELU(W h + b))."""

    def __init__(self, config: RecformerConfig, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(config.dim, config.dim)
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.decoder = None if config.tie_embeddings else nn.Parameter(torch.empty(vocab_size, config.dim))
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Features (M, D)."""
        return self.norm(F.gelu(self.dense(hidden_MD)))


class Recformer(nn.Module):
    """The encoder with its language model head.

    Attributes:
        logit_scale: log of the inverse temperature, fixed.
    """

    logit_scale: torch.Tensor

    def __init__(self, config: RecformerConfig, vocab_size: int) -> None:
        """Random initialisation from torch's global generator."""
        super().__init__()
        self.config, self.dim = config, config.dim
        self.token_embedding = nn.Embedding(vocab_size, config.dim)
        self.position_embedding = nn.Embedding(config.max_tokens + config.position_offset, config.dim)
        self.type_embedding = nn.Embedding(NUM_TYPES, config.dim)
        self.item_embedding = nn.Embedding(config.max_items + 1, config.dim)
        self.embedding_norm = nn.LayerNorm(config.dim, config.norm_eps)
        shape = (config.dim, config.num_heads, config.mlp_dim, config.window, config.norm_eps)
        self.layers = nn.ModuleList(LongformerLayer(*shape) for _ in range(config.num_layers))
        self.head = LanguageModelHead(config, vocab_size)
        scale = torch.tensor(-math.log(config.temperature), dtype=torch.float64)
        self.register_buffer("logit_scale", scale, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def output_matrix(self) -> torch.Tensor:
        """(V, D): features of the head to logits, with `head.bias`."""
        return self.token_embedding.weight if self.head.decoder is None else self.head.decoder

    def lay_out(self, groups: Groups) -> Layout:
        """Layout of sequences sorted by length, for all methods below."""
        return lay_out(groups, self.config.window, self.token_embedding.weight.device)

    def embed(
        self, token_PD: torch.Tensor, types_P: torch.Tensor, items_P: torch.Tensor, layout: Layout
    ) -> torch.Tensor:
        """Input vectors (P, D).

        Args:
            token_PD: embeddings of the tokens, from `token_embedding`.
            types_P: 0 [CLS], 1 key, 2 value.
            items_P: 0 for [CLS], 1 for the most recent item, and so on; at most max_items.
            layout: of the sequences; none longer than max_tokens.
        """
        position_PD = self.position_embedding(layout.indices + self.config.position_offset)
        return self.embedding_norm(token_PD + position_PD + self.type_embedding(types_P) + self.item_embedding(items_P))

    def hidden(self, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Hidden vectors of all tokens after the last layer, (P, D)."""
        for layer in self.layers:
            x_PD = layer(x_PD, layout)
        return x_PD

    def pooled(self, x_PD: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Hidden vectors of the [CLS] of each sequence, (N, D), not normalised."""
        *layers, last = self.layers
        for layer in layers:
            x_PD = layer(x_PD, layout)
        assert isinstance(last, LongformerLayer)
        return last.forward_first(x_PD, layout)

    def hidden_at(self, x_PD: torch.Tensor, layout: Layout, rows_M: torch.Tensor) -> torch.Tensor:
        """Hidden vectors of some tokens, none of them a [CLS], (M, D)."""
        *layers, last = self.layers
        for layer in layers:
            x_PD = layer(x_PD, layout)
        assert isinstance(last, LongformerLayer)
        return last.forward_rows(x_PD, layout, rows_M)
