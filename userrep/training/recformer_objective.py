"""What pretraining of Recformer minimises: the next item among those of the batch, and masked words of both.

Source: Li et al., KDD 2023 (arXiv 2305.13731, section 2.3), with the decisions of AaronHeee/RecFormer: the language
model is trained on histories and on next items, each with its own mean and weight; users choose among items, not items
among users. Differs: negatives are those of all workers with their exact gradient, and the mean over masked tokens is
that of the global batch, so the loss does not depend on the number of workers; a user is no negative of itself.
"""

import numpy as np
import torch
from pydantic import Field

from userrep.config import Config
from userrep.data.batch import UserBatch
from userrep.data.item_sequences import item_sequences
from userrep.data.vocabulary import Vocabulary
from userrep.data.word_masking import MaskingConfig, mask_words, sequence_keys
from userrep.losses.contrastive import TILE_SIZE, info_nce
from userrep.losses.gather import sum_over_ranks, world_size
from userrep.losses.masked_lm import linear_cross_entropy
from userrep.losses.negatives import Negatives
from userrep.models.recformer import Recformer
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import Precision, user_keys
from userrep.training.recformer_encoding import RecformerPlanner, encode_for_training
from userrep.training.system import Objective


class RecformerLossConfig(Config):
    """How the parts of the loss are weighed, and what is masked."""

    masked_lm_weight: float = Field(default=0.1, ge=0)  # of the language model on histories, and of that on next items
    masking: MaskingConfig = MaskingConfig()
    mask_shared_items: bool = False  # no negative: another user whose next item is the same; official code has them
    tile_size: int = Field(default=TILE_SIZE, ge=1)  # speed and memory only


class RecformerObjective(Objective):
    """Contrastive loss of histories and their next items, and masked language model on both."""

    def __init__(
        self,
        model: Recformer,
        vocabulary: Vocabulary,
        loss: RecformerLossConfig | None = None,
        memory: MemoryConfig | None = None,
        precision: Precision = "float32",
        seed: int = 0,
    ) -> None:
        """Args: vocabulary is that of the batches' tokens; seed decides, with step and user, what is masked."""
        super().__init__()
        self.model, self.vocabulary, self.loss, self.seed = model, vocabulary, loss or RecformerLossConfig(), seed
        self._precision, self._planner = precision, RecformerPlanner(model, memory or MemoryConfig())

    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss of this worker's part of a batch, by the convention of `losses/gather.py`, and its metrics.

        Args:
            batch: anchors are histories, positives their next items; key tokens are flagged.

        Metrics: `train/contrastive_loss`, `train/masked_lm_loss` and `train/masked_lm_item_loss` in nats, whose means
        over workers are those of the global batch; `train/negatives` as in `ClueObjective`; `train/tokens` of the
        sequences and `train/masked_tokens` among them, times the number of workers; `train/padding_fraction` and
        `train/chunk_size` of this worker.
        """
        config, device = self.model.config, self.model.token_embedding.weight.device
        sequences = item_sequences(batch, self.vocabulary.cls_id, config.max_items, config.max_tokens)
        keys_H = sequence_keys(batch.user_keys, self.seed, batch.step)
        masked = mask_words(sequences, keys_H, self.vocabulary, self.loss.masking)
        is_item_M = masked.positions >= sequences.offsets[len(batch.user_keys)]
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            plan = self._planner.plan(sequences)
            vector_HD, feature_MD, order_M = encode_for_training(self.model, sequences, masked, plan)
            masked_lm, both = self._masked_lm(feature_MD, masked.labels[order_M], is_item_M[order_M])
        anchor_BD, positive_BD = vector_HD.chunk(2)
        keys = [user_keys(batch, device)]
        if self.loss.mask_shared_items:
            keys.append(torch.from_numpy(batch.positive_item_keys).to(device))
        negatives = Negatives.gather(tuple(keys))
        contrastive = info_nce(
            anchor_BD, positive_BD, self.model.logit_scale, negatives, self.loss.tile_size, is_symmetric=False
        )
        loss = contrastive + self.loss.masked_lm_weight * masked_lm
        return loss, {
            "train/contrastive_loss": contrastive.item(),
            "train/masked_lm_loss": both[0],
            "train/masked_lm_item_loss": both[1],
            "train/negatives": negatives.mean_negatives,
            "train/padding_fraction": 0.0,  # packed: nothing but tokens is encoded
            "train/tokens": float(len(sequences.tokens) * world_size()),  # so that the mean over workers is the sum
            "train/masked_tokens": float(len(masked.labels) * world_size()),
            "train/chunk_size": float(plan.chunk_size),
        }

    def describe(self) -> str:
        """How the batches so far were encoded, for the log."""
        window = self.model.config.window
        attention = "to everything" if window is None else f"in a window of {window} and to [CLS]"
        return f"{self._precision}, attention {attention}, {self._planner.describe()}"

    def _masked_lm(
        self, feature_MD: torch.Tensor, labels: np.ndarray, is_item: np.ndarray
    ) -> tuple[torch.Tensor, list[float]]:
        """This worker's part of the sum of both means over the masked tokens of all workers, and the two parts."""
        device = feature_MD.device
        label_M, side_M = torch.from_numpy(labels).to(device), torch.from_numpy(is_item.astype(np.int64)).to(device)
        count_2 = torch.bincount(side_M, minlength=2)
        sum_over_ranks(count_2)
        weight_M = (world_size() / count_2.clamp(min=1).double())[side_M]
        matrix_VD, bias_V = self.model.output_matrix, self.model.head.bias
        loss, loss_M = linear_cross_entropy(feature_MD, matrix_VD, bias_V, label_M, weight_M)
        return loss, torch.bincount(side_M, weight_M * loss_M, minlength=2).tolist()
