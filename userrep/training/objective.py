"""What a training step minimises: a model and its loss as one module, so that data parallelism wraps both."""

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from userrep.config import Config
from userrep.data.batch import UserBatch
from userrep.losses.contrastive import TILE_SIZE, info_nce, sigmoid_loss
from userrep.losses.gather import world_size
from userrep.losses.negatives import Negatives
from userrep.models.cost import StepShape
from userrep.training.encoding import ChunkPlan, Encoder, MemoryConfig, MemoryPlanner, encode, encoded_twice
from userrep.training.system import Objective

Precision = Literal["float32", "bfloat16"]


class LossConfig(Config):
    """Which contrastive loss, over which negatives."""

    form: Literal["info_nce", "sigmoid"] = "info_nce"
    # service_pair: samples of two services contrast with samples of the same two services, and the loss is the mean
    # over these pairs (CLUE, arXiv 2111.11294); samples without a pair of services are one more group.
    # batch: everything contrasts with everything.
    negatives: Literal["service_pair", "batch"] = "service_pair"
    mask_shared_items: bool = False  # no negative: another user whose positive view ends with the same item
    tile_size: int = Field(default=TILE_SIZE, ge=1)  # speed and memory only


class ClueObjective(Objective):
    """Contrastive loss of the two views of a batch of users.

    The first `bag_steps` steps leave the transformer blocks out: they start as the identity, so the run starts with a
    bag-of-tokens encoder, whose steps cost a tenth, and the blocks then learn on embeddings that mean something.
    """

    def __init__(
        self,
        model: Encoder,
        bag_steps: int = 0,
        loss: LossConfig | None = None,
        memory: MemoryConfig | None = None,
        precision: Precision = "float32",
    ) -> None:
        """Args: precision is that of matrix products and attention in the encoder; weights and loss stay float32."""
        super().__init__()
        self.model, self.bag_steps, self.loss = model, bag_steps, loss or LossConfig()
        self._precision, self._planner = precision, MemoryPlanner(model, memory or MemoryConfig())
        model.logit_bias.requires_grad_(self.loss.form == "sigmoid")

    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of this worker's users against the users of all workers (`losses/contrastive.py`), and its metrics.

        Metrics: `train/negatives` of a row, mean over the global batch; of this worker's batch `train/unique_fraction`
        (items over events), `train/padding_fraction` (of the encoded tokens), `train/chunk_size`; and `train/tokens` of
        unique items, times the number of workers.
        """
        device = self.model.logit_scale.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            plan = self._planner.plan(batch)
            view_HD = encode(self.model, batch, plan, use_blocks=batch.step >= self.bag_steps)
        anchor_BD, positive_BD = view_HD.chunk(2)
        negatives = self._negatives(batch, device)
        if self.loss.form == "sigmoid":
            scale, bias = self.model.logit_scale, self.model.logit_bias
            loss = sigmoid_loss(anchor_BD, positive_BD, scale, bias, negatives, self.loss.tile_size)
        else:
            loss = info_nce(anchor_BD, positive_BD, self.model.logit_scale, negatives, self.loss.tile_size)
        return loss, {
            "train/negatives": negatives.mean_negatives,
            "train/unique_fraction": (len(batch.token_offsets) - 1) / len(batch.history_items),
            "train/padding_fraction": 0.0,  # packed: nothing but tokens is encoded
            "train/tokens": float(len(batch.tokens) * world_size()),  # so that the mean over workers is the sum
            "train/chunk_size": float(plan.chunk_size),
        }

    def describe(self) -> str:
        """How the batches so far were encoded, for the log."""
        is_ragged = self.model.logit_scale.is_cuda and self._precision == "bfloat16"
        attention = "over ragged sequences" if is_ragged else "group by group of equal lengths"
        return f"{self._precision}, attention {attention}, {self._planner.describe()}"

    def _negatives(self, batch: UserBatch, device: torch.device) -> Negatives:
        keys = [user_keys(batch, device)]
        if self.loss.mask_shared_items:
            keys.append(torch.from_numpy(batch.positive_item_keys).to(device))
        if self.loss.negatives == "batch":
            return Negatives.gather(tuple(keys))
        return Negatives.gather(tuple(keys), torch.from_numpy(batch.service_pairs.copy()).to(device))


def step_shape(batch: UserBatch, plan: ChunkPlan, loss: LossConfig) -> StepShape:
    """What a step on this batch computes on, with a single worker: the input of `models/cost.py`."""
    rows = np.unique(batch.service_pairs, return_counts=True)[1] if loss.negatives == "service_pair" else None
    logits = len(batch.user_keys) ** 2 if rows is None else int((rows**2).sum())
    # The sigmoid form computes its gradients with the forward pass, so it makes no tile twice.
    logits_again = 0 if loss.form == "sigmoid" else logits
    lengths = np.diff(batch.token_offsets), np.diff(batch.history_offsets)
    return StepShape.of(*lengths, logits, logits_again, *encoded_twice(batch, plan))


def user_keys(batch: UserBatch, device: torch.device) -> torch.Tensor:
    """Keys of the batch's users, int64 (B,)."""
    return torch.from_numpy(batch.user_keys.copy()).to(device)
