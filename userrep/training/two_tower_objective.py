"""What the two-tower model minimises: retrieval of the next item, and a regulariser on items of the whole corpus.

Source: Yao et al. 2021 (arXiv 2007.12865, equations 3, 5 and 6): L_main on training pairs + alpha L_self on items that
are drawn uniformly from the corpus.
Differs: an item that stands twice in a batch is no negative of itself, in neither loss; L_main can be corrected for the
frequency of items in batches (logQ, Yi et al. 2019).

Legend: `B` samples on this worker, `G` samples on all workers, `N` items of this worker that the regulariser sees,
`K` features.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field

from userrep.config import Config
from userrep.data.batch import UserBatch
from userrep.data.feature_views import AugmentationConfig, draw_items, draw_seed, draw_views, drop_features
from userrep.data.features import ItemFeatures, RaggedFeature, concat_features
from userrep.data.split import mix
from userrep.losses.contrastive import TILE_SIZE, info_nce
from userrep.losses.gather import all_gather, rank, world_size
from userrep.losses.negatives import Negatives
from userrep.losses.spread_out import global_orthogonal, spread_out_softmax
from userrep.models.two_tower import TwoTower
from userrep.training.objective import Precision
from userrep.training.system import Objective
from userrep.training.two_tower_encoding import as_values

Features = tuple[RaggedFeature, ...]


class TwoTowerLossConfig(Config):
    """Main loss, regulariser, and what the regulariser's views differ in."""

    masks_shared_items: bool = True  # no negative: another sample's positive that is the same item
    corrects_frequency: bool = False  # logQ: popular items are negatives more often, which the logits make up for
    feature_dropout: float = Field(default=0.0, ge=0, lt=1)  # probability of a feature of the main loss's items
    # self_supervised: two views of an item attract. spread_out, orthogonal: items without augmentation repel.
    regulariser: Literal["none", "self_supervised", "spread_out", "orthogonal"] = "self_supervised"
    alpha: float = Field(default=0.3, ge=0)  # weight of the regulariser
    augmentation: AugmentationConfig = AugmentationConfig()
    corpus_batch_size: int | None = Field(default=None, ge=2)  # items of the regulariser, of all workers; None: G
    regulariser_temperature: float | None = Field(default=None, ge=0.01, le=10)  # None: that of the main loss
    tile_size: int = Field(default=TILE_SIZE, ge=1)  # speed and memory only


_NO_COMPLEMENT = {"is_complementary": False}
# Changes of the default config that make the systems which the paper compares (sections 4.2 and 4.6).
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"regulariser": "none"},
    "cfm": {},
    "cfm_no_complement": {"augmentation": _NO_COMPLEMENT},
    "cfm_no_dropout": {"augmentation": {"value_dropout": 0.0}},
    "rfm": {"augmentation": {"masking": "rfm"}},
    "rfm_no_complement": {"augmentation": {"masking": "rfm", **_NO_COMPLEMENT}},
    "no_masking": {"augmentation": {"masking": "none"}},
    "fd": {"regulariser": "none", "feature_dropout": 0.3},
    "so": {"regulariser": "spread_out"},
}


class TwoTowerObjective(Objective):
    """Loss of samples whose query is the most recent event before the target.

    Everything that is drawn is a function of (seed, step) and of an item's position in the global batch, or of a
    sample's user and item; so it is the same on any number of workers.
    """

    def __init__(
        self,
        model: TwoTower,
        items: ItemFeatures,
        information_KK: np.ndarray,
        loss: TwoTowerLossConfig | None = None,
        seed: int = 0,
        precision: Precision = "float32",
    ) -> None:
        """Args: information_KK mutual information of the features; precision that of the towers' matrix products."""
        super().__init__()
        self.model, self.loss = model, loss or TwoTowerLossConfig()
        self._items, self._information_KK, self._seed, self._precision = items, information_KK, seed, precision

    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """This worker's part of the loss of the global batch.

        Metrics: `train/main_loss`, `train/regulariser` (before alpha; 0 without one), `train/negatives` of a row of the
        main loss, and `train/tokens`: values of features that were looked up, times the number of workers.

        Raises:
            ValueError: an item of the batch has no features; more workers than items of the regulariser.
        """
        device = self.model.logit_scale.device
        keys_B = torch.from_numpy(batch.positive_item_keys).to(device)
        negatives = self._negatives(keys_B)
        parts = self._main_features(batch)
        views, corpus_keys_N = self._corpus_features(sum(negatives.sizes), batch.step)
        features = concat_features([*parts, *views])
        num_samples = len(batch.user_keys)
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "bfloat16"):
            embedded = self.model.embed(as_values(features, device))
            query_BD = self.model.encode_queries(embedded[:num_samples])
            item_BD, *view_ND = self.model.encode_items(embedded[num_samples:]).split(
                [num_samples] + [len(corpus_keys_N)] * len(views)
            )
        bias_B = self._frequency_bias(keys_B, negatives, batch.step)
        scale = self.model.logit_scale
        main = info_nce(
            query_BD, item_BD, scale, negatives, self.loss.tile_size, is_symmetric=False, column_bias_B=bias_B
        )
        regulariser = self._regulariser(view_ND, torch.from_numpy(corpus_keys_N).to(device))
        return main + self.loss.alpha * regulariser, {
            "train/main_loss": main.item(),
            "train/regulariser": regulariser.item(),
            "train/negatives": negatives.mean_negatives,
            "train/tokens": float(sum(len(feature.values) for feature in features) * world_size()),
        }

    def describe(self) -> str:
        """What the loss is, for the log."""
        what = self.loss.regulariser
        if what == "self_supervised":
            what += f" ({self.loss.augmentation.masking})"
        return f"{self._precision}, {len(self._items)} items with {len(self._items.features)} features, {what}"

    def _negatives(self, keys_B: torch.Tensor) -> Negatives:
        if self.loss.masks_shared_items:
            return Negatives.gather((keys_B,))
        return Negatives.gather((torch.arange(len(keys_B), device=keys_B.device) + (rank() << 32),))

    def _main_features(self, batch: UserBatch) -> tuple[Features, Features]:
        """Features of the queries and of the items that follow them."""
        keys_XB = batch.item_keys[batch.latest_items].reshape(2, -1)
        query, item = (
            tuple(feature.take(rows) for feature in self._items.features) for rows in self._items.rows(keys_XB)
        )
        if self.training and self.loss.feature_dropout:
            seed = draw_seed(self._seed, batch.step, "supervised")
            sample_keys = mix(batch.user_keys.view(np.uint64), seed) ^ keys_XB[1].view(np.uint64)
            item = drop_features(item, sample_keys, self.loss.feature_dropout, seed)
        return query, item

    def _corpus_features(self, num_samples: int, step: int) -> tuple[list[Features], np.ndarray]:
        """Views of this worker's part of the regulariser's items, and the keys of these as int64 (N,)."""
        if self.loss.regulariser == "none":
            return [], np.zeros(0, dtype=np.int64)
        size = self.loss.corpus_batch_size or num_samples
        if size < world_size():
            raise ValueError(f"corpus_batch_size={size} is too small for {world_size()} workers: use one item for each")
        positions_N = np.arange(rank() * size // world_size(), (rank() + 1) * size // world_size())
        rows_N = draw_items(len(self._items), size, self._seed, step)[positions_N]
        if self.loss.regulariser == "self_supervised":
            config = self.loss.augmentation
            views = draw_views(self._items, rows_N, positions_N, self._information_KK, config, self._seed, step)
        else:
            views = (tuple(feature.take(rows_N) for feature in self._items.features),)
        return list(views), self._items.keys[rows_N].view(np.int64)

    def _frequency_bias(self, keys_B: torch.Tensor, negatives: Negatives, step: int) -> torch.Tensor | None:
        if not self.loss.corrects_frequency:
            return None
        if self.training:
            self.model.frequency.update(all_gather(keys_B, negatives.sizes), step)
        return -self.model.frequency.log_probabilities(keys_B)

    def _regulariser(self, view_ND: list[torch.Tensor], keys_N: torch.Tensor) -> torch.Tensor:
        if not view_ND:
            return self.model.logit_scale.new_zeros(())
        temperature, scale = self.loss.regulariser_temperature, self.model.logit_scale
        if temperature is not None:
            scale = torch.full_like(scale, -np.log(temperature))
        negatives = Negatives.gather((keys_N,))
        if self.loss.regulariser == "self_supervised":
            return info_nce(view_ND[0], view_ND[1], scale, negatives, self.loss.tile_size, is_symmetric=False)
        if self.loss.regulariser == "spread_out":
            return spread_out_softmax(view_ND[0], scale, negatives, self.loss.tile_size)
        return global_orthogonal(view_ND[0], negatives.sizes)


def variant(name: str, config: TwoTowerLossConfig | None = None) -> TwoTowerLossConfig:
    """The config of a system that the paper compares.

    Args:
        name: one of `VARIANTS`.
        config: what the variant does not decide.

    Raises:
        ValueError: there is no such variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"no variant {name!r} of the two-tower model: choose one of {', '.join(VARIANTS)}")
    values, changes = (config or TwoTowerLossConfig()).model_dump(mode="json"), dict(VARIANTS[name])
    augmentation = {**values["augmentation"], **dict(changes.pop("augmentation", {}))}  # pyright: ignore
    return TwoTowerLossConfig.parse({**values, **changes, "augmentation": augmentation})
