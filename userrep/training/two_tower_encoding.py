"""From features of items as numpy arrays to vectors of a two-tower model."""

from collections.abc import Sequence

import numpy as np
import torch

from userrep.data.features import ItemFeatures, RaggedFeature
from userrep.models.two_tower import FeatureTable, TwoTower, TwoTowerConfig, Values

ENCODE_ITEMS = 4096  # bounds the memory of a forward pass


def build_two_tower(config: TwoTowerConfig, items: ItemFeatures) -> TwoTower:
    """A new model over the features of a corpus; random initialisation from torch's global generator."""
    return TwoTower(config, [FeatureTable(v.num_ids, v.config.dim) for v in items.vocabularies])


def as_values(features: Sequence[RaggedFeature], device: torch.device) -> list[Values]:
    """Features as the model takes them."""
    values = []
    for feature in features:
        dtype = np.float32 if feature.values.dtype == np.float32 else np.int64
        flat, offsets = (torch.from_numpy(a) for a in (feature.values.astype(dtype), feature.offsets.astype(np.int64)))
        values.append((flat.to(device), offsets.to(device)))
    return values


@torch.no_grad()
def encode_rows(model: TwoTower, items: ItemFeatures, rows_N: np.ndarray, as_queries: bool = False) -> np.ndarray:
    """Vectors of items, each with all of its features; float32 (N, D), L2 norm 1.

    Args:
        model: its mode is left as it is: nothing is drawn here.
        items: of the corpus.
        rows_N: of the items; all of them are `np.arange(len(items))`.
        as_queries: by the query tower, else by the item tower.
    """
    device = model.logit_scale.device
    parts = [torch.empty(0, model.dim)]
    for start in range(0, len(rows_N), ENCODE_ITEMS):
        rows = rows_N[start : start + ENCODE_ITEMS]
        embedded = model.embed(as_values([feature.take(rows) for feature in items.features], device))
        vectors = model.encode_queries(embedded) if as_queries else model.encode_items(embedded)
        parts.append(vectors.float().cpu())
    return torch.cat(parts).numpy()
