"""Baseline encoder without attention: mean of the token embeddings of a history's items, then a two-layer head.

Legend as in `clue.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class BagOfTokens(nn.Module):
    """Same inputs, outputs and loss as `Clue`; an event is the mean of its tokens, a history that of its events."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.1)

    def forward(
        self,
        tokens_T: torch.Tensor,
        token_offsets: torch.Tensor,
        history_items_E: torch.Tensor,
        history_offsets: torch.Tensor,
        use_blocks: bool = True,
    ) -> torch.Tensor:
        """User vectors (H, D), L2 norm 1, of all histories of a batch; there are no blocks to use or not."""
        item_UD = F.embedding_bag(tokens_T, self.token_embedding.weight, token_offsets[:-1], mode="mean")
        history_HD = F.embedding_bag(history_items_E, item_UD, history_offsets[:-1], mode="mean")
        return F.normalize(self.head(history_HD), dim=-1)
