"""The two-tower model as the training loop sees it."""

from pathlib import Path

import numpy as np

from userrep.config import ConfigError
from userrep.data.features import ItemFeatures
from userrep.data.pool import Pool, load_pool
from userrep.evaluation.retrieval import corpus_ranks, retrieval_scores
from userrep.manifest import read_manifest
from userrep.models.two_tower import TwoTower
from userrep.training.encoding import MemoryConfig
from userrep.training.settings import TwoTowerPretraining
from userrep.training.system import Validate
from userrep.training.two_tower_encoding import build_two_tower, encode_rows
from userrep.training.two_tower_objective import TwoTowerObjective


class TwoTowerSystem:
    """A pretraining run of the two-tower model on tokenized shards with features."""

    def __init__(self, config: TwoTowerPretraining, shards: Path) -> None:
        """Raises ConfigError: the shards have no features."""
        self._config, self._shards, self._facts = config, shards, read_manifest(shards).facts
        if "mutual_information" not in self._facts:
            raise ConfigError(
                f"{shards} holds no features of items, which the two-tower model reads: set "
                "source.keep_attributes=true and tokenize.features"
            )
        self.items = ItemFeatures.load(shards)

    def build_model(self) -> TwoTower:
        """New towers over the features of the shards."""
        return build_two_tower(self._config.model, self.items)

    def build_objective(self, model: TwoTower, memory: MemoryConfig) -> TwoTowerObjective:
        """Retrieval of the next item, and the regulariser; `memory` is of no use to it."""
        config, information_KK = self._config, np.array(self._facts["mutual_information"])
        return TwoTowerObjective(model, self.items, information_KK, config.loss, config.seed, config.precision)

    @property
    def has_idle_parameters(self) -> bool:
        """None are idle."""
        return False

    def load_validation(self) -> Validate:
        """The last items of the first validation users among all items, given the ones before."""
        config = self._config
        pool = load_pool(self._shards, self._facts["shards"], config.views, "validation", config.pool_size)
        query_rows_P, target_rows_P = pool_rows(pool, self.items)
        return lambda model: {
            f"val/{name}": float(values.mean())
            for name, values in corpus_scores(model, self.items, query_rows_P, target_rows_P).items()
        }


def pool_rows(pool: Pool, items: ItemFeatures) -> tuple[np.ndarray, np.ndarray]:
    """Rows of every user's query, the most recent item of the anchor, and of the next item, each (P,)."""
    batch = pool.batch()
    query_P, target_P = items.rows(batch.item_keys[batch.latest_items].reshape(2, -1))
    return query_P, target_P


def corpus_scores(
    model: TwoTower, items: ItemFeatures, query_rows_Q: np.ndarray, target_rows_Q: np.ndarray
) -> dict[str, np.ndarray]:
    """Recall and MAP at 10 and 50 of every query among all items but the query's own, (Q,) each."""
    queries = encode_rows(model, items, query_rows_Q, as_queries=True)
    corpus = encode_rows(model, items, np.arange(len(items)))
    return retrieval_scores(*corpus_ranks(queries, corpus, target_rows_Q, query_rows_Q))
