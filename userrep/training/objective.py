"""What a training step minimises: a model and its loss as one module, so that data parallelism wraps both."""

import numpy as np
import torch
from torch import nn

from userrep.data.batch import HistoryBatch, UserBatch
from userrep.losses.contrastive import clip_loss
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue

Encoder = Clue | BagOfTokens


class ClueObjective(nn.Module):
    """Contrastive loss of the two views of a batch of users.

    The first `bag_steps` steps leave the transformer blocks out: they start as the identity, so the run starts with a
    bag-of-tokens encoder, whose steps cost a tenth, and the blocks then learn on embeddings that mean something.
    """

    def __init__(self, model: Encoder, bag_steps: int = 0) -> None:
        super().__init__()
        self.model, self.bag_steps = model, bag_steps

    def forward(self, batch: UserBatch) -> torch.Tensor:
        """Scalar loss of this worker's users against the users of all workers (`losses/contrastive.py`)."""
        view_HD = encode(self.model, batch, use_blocks=batch.step >= self.bag_steps)
        anchor_BD, positive_BD = view_HD.chunk(2)
        return clip_loss(anchor_BD, positive_BD, self.model.logit_scale, user_keys(batch, view_HD.device))


def encode(model: Encoder, batch: HistoryBatch, use_blocks: bool = True) -> torch.Tensor:
    """User vectors (H, D) of all histories of a batch."""
    arrays = (batch.tokens, batch.token_offsets, batch.history_items, batch.history_offsets)
    device = model.logit_scale.device
    # int64: what every torch index operation accepts; the copy also gives torch memory that it may write to.
    return model(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in arrays), use_blocks)


def user_keys(batch: UserBatch, device: torch.device) -> torch.Tensor:
    """Keys of the batch's users, int64 (B,)."""
    return torch.from_numpy(batch.user_keys.copy()).to(device)
