"""Ragged values of the features of all items of a corpus.

A feature without a value is an empty list, whatever its kind: the item lacks the attribute. Models see such a feature
as they see a masked one.

Legend: `N` items, `V` values of a feature, all items' one after another, `K` features.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userrep.data.batch import gather_ranges
from userrep.data.feature_vocabulary import KEY_COLUMN, Attributes, FeatureConfig, FeatureVocabulary, raw_values
from userrep.data.split import id_keys

VALUES_FILE, VOCABULARY_FILE = "features.parquet", "features.json"


@dataclass(frozen=True)
class RaggedFeature:
    """Values of one feature of several items.

    Attributes:
        values: ids int32 (V,), or standardised numbers float32 (V,).
        offsets: borders of the items in `values`, int64 (N + 1,).
    """

    values: np.ndarray
    offsets: np.ndarray

    def take(self, rows: np.ndarray) -> "RaggedFeature":
        """The same of some items, in the order given."""
        starts = self.offsets[rows]
        positions, offsets = gather_ranges(starts, self.offsets[rows + 1] - starts)
        return RaggedFeature(self.values[positions], offsets)

    def keep(self, is_kept_V: np.ndarray) -> "RaggedFeature":
        """The same without some of the values."""
        before = np.concatenate([[0], np.cumsum(is_kept_V)])
        return RaggedFeature(self.values[is_kept_V], before[self.offsets])


def concat_features(parts: Sequence[Sequence[RaggedFeature]]) -> tuple[RaggedFeature, ...]:
    """Features of the items of several parts, one part after another.

    Args:
        parts: at least one, each with K features.
    """
    joined = []
    for columns in zip(*parts, strict=True):
        lengths = np.concatenate([np.diff(column.offsets) for column in columns])
        values = np.concatenate([column.values for column in columns])
        joined.append(RaggedFeature(values, np.concatenate([[0], np.cumsum(lengths)])))
    return tuple(joined)


@dataclass(frozen=True)
class ItemFeatures:
    """Features of all items of a corpus.

    Attributes:
        keys: 64-bit keys of the items, uint64 (N,), ascending; a row of the table is a position in them.
        vocabularies: of the features, K.
        features: values of each feature, K.
    """

    keys: np.ndarray
    vocabularies: tuple[FeatureVocabulary, ...]
    features: tuple[RaggedFeature, ...]

    @classmethod
    def of(
        cls, item_ids: Sequence[str], attributes: Iterable[Attributes], vocabularies: tuple[FeatureVocabulary, ...]
    ) -> "ItemFeatures":
        """Encodes items; of several with one id the first one counts."""
        keys, first = np.unique(id_keys(pa.array(item_ids, type=pa.string())), return_index=True)
        columns: list[list[list[int] | list[float]]] = [[] for _ in vocabularies]
        ids = [vocabulary.ids() for vocabulary in vocabularies]
        for item_id, item_attributes in zip(item_ids, attributes, strict=True):
            for column, vocabulary, known in zip(columns, vocabularies, ids, strict=True):
                column.append(vocabulary.encode(raw_values(vocabulary.config, item_id, item_attributes), known))
        ragged = (_ragged(column, vocabulary) for column, vocabulary in zip(columns, vocabularies, strict=True))
        return cls(keys, vocabularies, tuple(feature.take(first) for feature in ragged))

    def __len__(self) -> int:
        """Number of items."""
        return len(self.keys)

    def rows(self, keys: np.ndarray) -> np.ndarray:
        """Rows of items, int64, in the shape of `keys`.

        Args:
            keys: 64-bit keys as uint64, or as the int64 of a batch.

        Raises:
            ValueError: an item has no features.
        """
        wanted = keys.view(np.uint64)
        rows = np.minimum(np.searchsorted(self.keys, wanted), max(0, len(self) - 1))
        is_missing = self.keys[rows] != wanted if len(self) else np.ones(wanted.shape, dtype=bool)
        if is_missing.any():
            raise ValueError(
                f"{is_missing.sum()} of {wanted.size} items are not among the {len(self)} with features (the first has "
                f"the key {wanted[is_missing][0]}): make the features from the items of the same ingest"
            )
        return rows

    def to_table(self) -> pa.Table:
        """One row per item: its key, and a list of values for each feature."""
        columns = [pa.ListArray.from_arrays(f.offsets.astype(np.int32), pa.array(f.values)) for f in self.features]
        names = [vocabulary.config.name for vocabulary in self.vocabularies]
        return pa.table([self.keys, *columns], names=[KEY_COLUMN, *names])

    @classmethod
    def from_table(cls, table: pa.Table, vocabularies: tuple[FeatureVocabulary, ...]) -> Self:
        """Inverse of `to_table`; rows may come in any order, and of several with one key the first one counts."""
        keys, first = np.unique(table[KEY_COLUMN].to_numpy(), return_index=True)
        lists = (table[vocabulary.config.name].combine_chunks() for vocabulary in vocabularies)
        features = (RaggedFeature(lst.values.to_numpy(), lst.offsets.to_numpy().astype(np.int64)) for lst in lists)
        return cls(keys, vocabularies, tuple(feature.take(first) for feature in features))

    def save(self, directory: Path) -> None:
        """Writes a Parquet file of values and a JSON file of vocabularies into a directory."""
        pq.write_table(self.to_table(), directory / VALUES_FILE)
        described = [
            {"config": v.config.model_dump(mode="json"), "values": v.values, "mean": v.mean, "std": v.std}
            for v in self.vocabularies
        ]
        (directory / VOCABULARY_FILE).write_text(json.dumps(described, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "ItemFeatures":
        """Inverse of `save`."""
        described = json.loads((directory / VOCABULARY_FILE).read_text(encoding="utf-8"))
        vocabularies = tuple(
            FeatureVocabulary(FeatureConfig.parse(v["config"]), tuple(v["values"]), v["mean"], v["std"])
            for v in described
        )
        return cls.from_table(pq.read_table(directory / VALUES_FILE), vocabularies)


def _ragged(column: Sequence[Sequence[float]], vocabulary: FeatureVocabulary) -> RaggedFeature:
    dtype = np.float32 if vocabulary.config.kind == "dense" else np.int32
    lengths = np.fromiter((len(values) for values in column), dtype=np.int64, count=len(column))
    flat = np.fromiter((value for values in column for value in values), dtype=dtype, count=int(lengths.sum()))
    return RaggedFeature(flat, np.concatenate([[0], np.cumsum(lengths)]))
