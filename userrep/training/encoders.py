"""Trained encoders of every system, as evaluation and inference see them.

Legend: `H` histories, `B` users, `N` items, `D` width.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import torch

from userrep.data.batch import HistoryBatch, UserBatch
from userrep.data.features import ItemFeatures
from userrep.data.key_values import KeyValueConfig
from userrep.data.split import id_keys
from userrep.data.tokenizer import TOKENIZER_NAME, open_item_tokenizer
from userrep.data.vocabulary import Vocabulary
from userrep.manifest import read_manifest
from userrep.models.clue import Clue
from userrep.models.recformer import Recformer
from userrep.models.two_tower import TwoTower, TwoTowerConfig
from userrep.training.checkpoint import MODEL_FILE, load_encoder, load_model
from userrep.training.encoding import encode
from userrep.training.recformer_system import encode_batch
from userrep.training.recformer_table import load_recformer
from userrep.training.two_tower_encoding import build_two_tower, encode_rows


class TrainedEncoder(ABC):
    """A trained model in evaluation mode.

    Attributes:
        dim: width of its vectors, all of L2 norm 1.
        model: what was trained.
        reads_ids: it knows items by their ids; others read what an item's text says.
        is_row_stable: under `models.row_stable`, a history's vector has the same bits whatever else is in the batch.
    """

    reads_ids: ClassVar[bool] = False
    is_row_stable: ClassVar[bool] = True

    def __init__(self, model: Clue | Recformer | TwoTower) -> None:
        self.model, self.dim = model, model.dim

    @abstractmethod
    def encode_histories(self, batch: HistoryBatch) -> torch.Tensor:
        """User vectors (H, D) of all histories of a batch."""

    def encode_views(self, batch: UserBatch) -> torch.Tensor:
        """Vectors of what the system compares: those of the anchors, then those of the positives, (2B, D)."""
        return self.encode_histories(batch)


class ItemEncoder(TrainedEncoder):
    """One that has vectors of items too, which compare with those of users."""

    @abstractmethod
    def encode_items(self, item_ids: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Vectors of items, float32 (N, D).

        Args:
            item_ids: ids.
            texts: of the items as ingested, with their attributes.
        """


class ClueEncoder(TrainedEncoder):
    """CLUE, taught tasks or not."""

    model: Clue

    @torch.no_grad()
    def encode_histories(self, batch: HistoryBatch) -> torch.Tensor:
        """User vectors (H, D)."""
        return encode(self.model, batch)


class RecformerEncoder(ItemEncoder):
    """Recformer: an item is a history of one event."""

    model: Recformer
    is_row_stable = False  # blocks of its attention reach across the sequences of a batch

    def __init__(
        self, model: Recformer, vocabulary: Vocabulary, tokenizer_path: Path, attributes: KeyValueConfig
    ) -> None:
        """Args: tokenizer_path of the tokenizer.json of the vocabulary; attributes are read as in training."""
        super().__init__(model)
        self._vocabulary, self._tokenize = vocabulary, open_item_tokenizer(tokenizer_path, attributes)

    def encode_histories(self, batch: HistoryBatch) -> torch.Tensor:
        """User vectors (H, D)."""
        return encode_batch(self.model, self._vocabulary, batch)

    def encode_items(self, item_ids: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Vectors of items, float32 (N, D)."""
        tokens = self._tokenize(list(texts))
        offsets = np.cumsum([0, *map(len, tokens)])
        each = np.arange(len(tokens) + 1)
        flat = np.concatenate([np.zeros(0, dtype=np.int32), *tokens])
        return self.encode_histories(HistoryBatch(flat, offsets, each[:-1], each, each[:-1])).cpu().numpy()


class TwoTowerEncoder(ItemEncoder):
    """Two towers: a user is its most recent item, seen as a query."""

    model: TwoTower
    reads_ids = True

    def __init__(self, model: TwoTower, items: ItemFeatures) -> None:
        """Args: items of the corpus."""
        super().__init__(model)
        self.items = items

    def encode_histories(self, batch: HistoryBatch) -> torch.Tensor:
        """Query vectors (H, D). Raises ValueError: an item is not in the corpus."""
        rows_H = self.items.rows(batch.item_keys[batch.latest_items])
        return torch.from_numpy(encode_rows(self.model, self.items, rows_H, as_queries=True))

    def encode_views(self, batch: UserBatch) -> torch.Tensor:
        """Query vectors of the anchors, then item vectors of the positives, (2B, D)."""
        query_B, item_B = self.items.rows(batch.item_keys[batch.latest_items].reshape(2, -1))
        queries = encode_rows(self.model, self.items, query_B, as_queries=True)
        return torch.from_numpy(np.concatenate([queries, encode_rows(self.model, self.items, item_B)]))

    def encode_items(self, item_ids: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """Vectors of items, float32 (N, D). Raises ValueError: an item is not in the corpus."""
        rows_N = self.items.rows(id_keys(pa.array(item_ids, type=pa.string())))
        return encode_rows(self.model, self.items, rows_N)


def open_encoder(directory: Path) -> TrainedEncoder:
    """The encoder of a committed encoder table, whatever its system."""
    manifest = read_manifest(directory)
    system = manifest.config.get("system", "clue")
    if system == "recformer":
        attributes = KeyValueConfig.parse(manifest.facts["attributes"])
        return RecformerEncoder(*load_recformer(directory), directory / TOKENIZER_NAME, attributes)
    if system == "two_tower":
        items = ItemFeatures.load(directory)
        towers = build_two_tower(TwoTowerConfig.parse(manifest.facts["model"]), items)
        load_model(directory / MODEL_FILE, towers)
        return TwoTowerEncoder(towers.eval(), items)
    return ClueEncoder(load_encoder(directory))
