"""What a training step minimises: a model and its loss as one module, so that data parallelism wraps both."""

import numpy as np
import torch
from torch import nn

from userrep.data.batch import HistoryBatch, UserBatch
from userrep.losses.contrastive import clip_loss
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue


class ClueObjective(nn.Module):
    """Contrastive loss of the two views of a batch of users."""

    def __init__(self, model: Clue | BagOfTokens) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: UserBatch) -> torch.Tensor:
        """Scalar loss of this worker's users against the users of all workers (`losses/contrastive.py`)."""
        view_HD = encode(self.model, batch)
        anchor_BD, positive_BD = view_HD.chunk(2)
        return clip_loss(anchor_BD, positive_BD, self.model.logit_scale, torch.from_numpy(batch.user_keys.copy()))


def encode(model: Clue | BagOfTokens, batch: HistoryBatch) -> torch.Tensor:
    """User vectors (H, D) of all histories of a batch."""
    return model(
        _long(batch.tokens), _long(batch.token_offsets), _long(batch.history_items), _long(batch.history_offsets)
    )


def _long(array: np.ndarray) -> torch.Tensor:
    # int64: what every torch index operation accepts; the copy also gives torch memory that it may write to.
    return torch.from_numpy(array.astype(np.int64))
