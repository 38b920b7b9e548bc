"""A corpus of items with features and pairs of (item, next item), from raw tables, in this process and without Ray.

The tables are ingested by the project's own parsers; the one thing left out is the tokenizer, which no feature needs.

Legend: `N` items, `K` features, `Q` queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userrep import schema
from userrep.data.assemble import assemble_shard, items_file
from userrep.data.feature_vocabulary import FeatureConfig, ValueCounts
from userrep.data.features import ItemFeatures
from userrep.data.ingest import TABLES
from userrep.data.item_text import parse_attributes
from userrep.data.mutual_information import MutualInformation
from userrep.data.parse import ITEMS, parse_part
from userrep.data.sources.source import Source
from userrep.data.split import SPLITS, SplitConfig
from userrep.data.stream import ShardSet
from userrep.data.views import RowGroup, manifest_row_groups, merge_row_groups, read_row_group
from userrep.evaluation.retrieval import head_items

ROW_GROUP_USERS = 2048
SPLIT = SplitConfig(validation=0.05, test=0.10)


@dataclass(frozen=True)
class Queries:
    """Held-out pairs: rows of the query items and of the items that follow them, int64 (Q,) each."""

    items: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.items)


@dataclass(frozen=True)
class NextItemCorpus:
    """What a run trains on and is measured with.

    Attributes:
        items: features of all items.
        information: mutual information of the features, float64 (K, K).
        shards: training samples are those of its users of the split `train`.
        held_out: pairs of the users of the other splits.
        is_head: the 10% of the items that training users have most events of, bool (N,).
    """

    items: ItemFeatures
    information: np.ndarray
    shards: ShardSet
    held_out: dict[str, Queries]
    is_head: np.ndarray


def build_corpus(
    source: Source, configs: Sequence[FeatureConfig], directory: Path, max_pairs: int, num_shards: int = 4
) -> NextItemCorpus:
    """Ingests raw tables into a directory and makes features of all items.

    Args:
        source: with `keep_attributes`.
        configs: features.
        directory: empty; it must stay while the corpus is trained on.
        max_pairs: most recent pairs of every held-out history.
        num_shards: of users.
    """
    for table in TABLES:
        for index, part in enumerate(source.parts(table)):
            parse_part(table, index, part, directory, num_shards)
    shards = [
        assemble_shard(number, source.services(), directory, ROW_GROUP_USERS, SPLIT) for number in range(num_shards)
    ]
    for number in range(num_shards):
        _drop_texts(directory / items_file(number))
    items, information_KK = _featurize(directory, configs)
    groups = [read_row_group(directory, shard, group) for shard, group, _ in manifest_row_groups(shards)]
    users, _ = merge_row_groups(groups)
    held_out = {split: _last_pairs(users, items, split, max_pairs) for split in SPLITS[1:]}
    is_train_E = np.repeat(users.splits == SPLITS.index("train"), np.diff(users.history_offsets[users.user_offsets]))
    counts_N = np.bincount(items.rows(users.item_keys)[users.items[is_train_E]], minlength=len(items))
    return NextItemCorpus(items, information_KK, ShardSet(directory, shards), held_out, head_items(counts_N))


def _drop_texts(path: Path) -> None:
    """Replaces the texts of a shard's items by one token each: batches carry tokens, whoever reads them."""
    texts = pq.ParquetFile(path)
    groups = [texts.read_row_group(number) for number in range(texts.num_row_groups)]
    with pq.ParquetWriter(path, schema.SHARD_ITEMS) as writer:
        for group in groups:
            tokens = pa.ListArray.from_arrays(
                np.arange(group.num_rows + 1, dtype=np.int32), np.zeros(group.num_rows, dtype=np.int32)
            )
            table = pa.table([group["item_id"], tokens], schema=schema.SHARD_ITEMS)
            writer.write_table(table, row_group_size=max(1, group.num_rows))


def _featurize(directory: Path, configs: Sequence[FeatureConfig]) -> tuple[ItemFeatures, np.ndarray]:
    table = pa.concat_tables(pq.read_table(file) for file in sorted((directory / ITEMS).glob("part-*.parquet")))
    ids, attributes = table["item_id"].to_pylist(), [parse_attributes(text) for text in table["text"].to_pylist()]
    counts = ValueCounts(configs)
    counts.add(ids, attributes)
    items = ItemFeatures.of(ids, attributes, counts.vocabularies())
    information = MutualInformation(items.vocabularies)
    information.add(items)
    return items, information.result()


def _last_pairs(users: RowGroup, items: ItemFeatures, split: str, max_pairs: int) -> Queries:
    """The most recent pairs of neighbours of every history of a split's users, but those of one item with itself."""
    of_history = np.repeat(users.splits == SPLITS.index(split), np.diff(users.user_offsets))
    starts, stops = users.history_offsets[:-1][of_history], users.history_offsets[1:][of_history]
    rows = items.rows(users.item_keys)[users.items]
    targets = np.concatenate(
        [np.arange(max(start + 1, stop - max_pairs), stop) for start, stop in zip(starts, stops, strict=True)]
        or [np.zeros(0, dtype=np.int64)]
    )
    targets = targets[rows[targets - 1] != rows[targets]]
    return Queries(rows[targets - 1], rows[targets])
