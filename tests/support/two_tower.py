"""A small corpus of items with features, and batches of next items over it."""

import numpy as np
import pyarrow as pa
import torch

from userrep.data.batch import UserBatch
from userrep.data.feature_vocabulary import FeatureConfig, ValueCounts
from userrep.data.features import ItemFeatures
from userrep.data.split import id_keys
from userrep.models.two_tower import TwoTower, TwoTowerConfig
from userrep.training.two_tower_encoding import build_two_tower

CONFIGS = (
    FeatureConfig(name="id", kind="id", dim=4),
    FeatureConfig(name="brand", kind="categorical", attribute="brand", dim=3),
    FeatureConfig(name="category", kind="multi_hot", attribute="category", dim=3),
    FeatureConfig(name="words", kind="bag", attribute="title", dim=5),
    FeatureConfig(name="price", kind="dense", attribute="price"),
)
# Brand, category and words go together; the id tells of all, as ids do.
INFORMATION = np.array(
    [
        [0.0, 1.0, 2.0, 3.0, 0.5],
        [1.0, 0.0, 0.9, 0.8, 0.1],
        [2.0, 0.9, 0.0, 0.7, 0.2],
        [3.0, 0.8, 0.7, 0.0, 0.3],
        [0.5, 0.1, 0.2, 0.3, 0.0],
    ]
)
NUM_ITEMS = 30


def make_items() -> ItemFeatures:
    rng = np.random.default_rng(0)
    ids, attributes = [f"i{n}" for n in range(NUM_ITEMS)], []
    for _ in ids:
        words = " ".join(f"w{n}" for n in rng.integers(0, 20, rng.integers(0, 7)))
        categories = [f"c{n}" for n in rng.integers(0, 6, rng.integers(0, 4))]
        price = [str(rng.integers(1, 9))] if rng.random() < 0.8 else []
        attributes.append(
            [("brand", [f"b{rng.integers(5)}"]), ("category", categories), ("title", [words]), ("price", price)]
        )
    counts = ValueCounts(CONFIGS)
    counts.add(ids, attributes)
    return ItemFeatures.of(ids, attributes, counts.vocabularies())


def make_model(items: ItemFeatures, **changes: object) -> TwoTower:
    torch.manual_seed(0)
    config = TwoTowerConfig.parse({"hidden_dims": [8, 6], "temperature": 0.2, **changes})
    return build_two_tower(config, items).double()


def make_batch(size: int = 12, seed: int = 0, step: int = 3, start: int = 0, stop: int | None = None) -> UserBatch:
    """Samples [start, stop) of a global batch; some have the same user, several the same next item."""
    rng = np.random.default_rng([seed, step])
    lengths, users = rng.integers(1, 4, size), rng.integers(0, size, size)
    before = [rng.integers(0, NUM_ITEMS, length) for length in lengths]
    targets = np.minimum(rng.geometric(0.2, size), NUM_ITEMS) - 1
    part = slice(start, stop)
    histories = [*before[part], *targets[part, None]]
    used, references = np.unique(np.concatenate(histories), return_inverse=True)
    return UserBatch(
        tokens=np.zeros(len(used), dtype=np.int32),
        token_offsets=np.arange(len(used) + 1, dtype=np.int32),
        history_items=references.astype(np.int32),
        history_offsets=np.concatenate([[0], np.cumsum([len(h) for h in histories])]).astype(np.int32),
        user_keys=users[part].astype(np.int64),
        service_pairs=np.zeros(len(users[part]), dtype=np.int64),
        item_keys=id_keys(pa.array([f"i{n}" for n in used])).view(np.int64),
        step=step,
    )
