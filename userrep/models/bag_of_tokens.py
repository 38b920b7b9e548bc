"""Baseline encoder without attention: mean of the token embeddings of a history's items, then a two-layer head.

Legend as in `clue.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from userrep.models.clue import LOGIT_BIAS_INIT
from userrep.models.layers import mean_of_sequences
from userrep.models.packing import Groups


class BagOfTokens(nn.Module):
    """Same inputs, outputs and loss as `Clue`; an event is the mean of its tokens, a history that of its events."""

    def __init__(self, vocab_size: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS_INIT))
        nn.init.normal_(self.token_embedding.weight, std=0.1)

    def encode_items(self, tokens_T: torch.Tensor, groups: Groups, use_blocks: bool = True) -> torch.Tensor:
        """Item vectors (U, D); arguments as in `clue.py`, there are no blocks to use or not."""
        return mean_of_sequences(self.token_embedding(tokens_T), groups)

    def encode_histories(
        self, item_UD: torch.Tensor, history_items_E: torch.Tensor, groups: Groups, use_blocks: bool = True
    ) -> torch.Tensor:
        """User vectors (H, D), L2 norm 1; arguments as in `clue.py`."""
        history_HD = mean_of_sequences(F.embedding(history_items_E, item_UD), groups)
        return F.normalize(self.head(history_HD), dim=-1)
