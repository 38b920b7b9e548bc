"""From an ingested item table to the features of all items and their mutual information, with Ray Data.

Every row group of the table is a task; counts come back as rows, and their sum is the same in any order. The driver
holds the vocabularies and the features, which every training worker holds as well.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from userrep.data.feature_vocabulary import Attributes, FeatureConfig, FeatureVocabulary, ValueCounts
from userrep.data.features import ItemFeatures
from userrep.data.item_text import parse_attributes
from userrep.data.mutual_information import MutualInformation
from userrep.data.parse import ITEMS

Block = tuple[str, int]  # Parquet file and row group


def featurize(directory: Path, configs: Sequence[FeatureConfig]) -> tuple[ItemFeatures, np.ndarray]:
    """Features of all items of an ingested table, and the mutual information of these features, float64 (K, K).

    Args:
        directory: of the table; its items are read three times, and never held as text.
        configs: the features; vocabularies are those of these items.

    Raises:
        ValueError: there is no item, or the features do not suit the items.
    """
    blocks = item_blocks(directory)
    vocabularies = count_values(blocks, configs).vocabularies()
    return encode_items(blocks, vocabularies), mutual_information(blocks, vocabularies)


def item_blocks(directory: Path) -> list[Block]:
    """Row groups of the items of an ingested table, in the order of its parts.

    Raises:
        ValueError: there is no item.
    """
    files = sorted((directory / ITEMS).glob("part-*.parquet"))
    blocks = [(str(file), group) for file in files for group in range(pq.ParquetFile(file).num_row_groups)]
    if not blocks:
        raise ValueError(f"no items in {directory / ITEMS}: give the directory of an ingested table")
    return blocks


def count_values(blocks: Sequence[Block], configs: Sequence[FeatureConfig]) -> ValueCounts:
    """How many items have each value of each feature. An item whose record stands twice is counted twice."""

    def run(ids: list[str], attributes: list[Attributes]) -> pa.Table:
        counts = ValueCounts(configs)
        counts.add(ids, attributes)
        rows = [(number, *pair) for number, counter in enumerate(counts.counts) for pair in counter.items()]
        columns = list(zip(*rows, strict=True)) or [[], [], []]
        types = (pa.int64(), pa.string(), pa.int64())
        arrays = [pa.array(column, type_) for column, type_ in zip(columns, types, strict=True)]
        return pa.table(arrays, names=["feature", "value", "count"])

    total = ValueCounts(configs)
    for table in _run_blocks(run, blocks):
        features, values, counts = (table[name].to_pylist() for name in ("feature", "value", "count"))
        for feature, value, count in zip(features, values, counts, strict=True):
            total.counts[feature][value] += count
    return total


def encode_items(blocks: Sequence[Block], vocabularies: tuple[FeatureVocabulary, ...]) -> ItemFeatures:
    """Features of all items; of several with one id the first one counts."""

    def run(ids: list[str], attributes: list[Attributes]) -> pa.Table:
        return ItemFeatures.of(ids, attributes, vocabularies).to_table()

    tables = {table["block"][0].as_py(): table for table in _run_blocks(run, blocks) if table.num_rows}
    return ItemFeatures.from_table(pa.concat_tables([tables[block] for block in sorted(tables)]), vocabularies)


def mutual_information(blocks: Sequence[Block], vocabularies: tuple[FeatureVocabulary, ...]) -> np.ndarray:
    """Mutual information of all pairs of features in one pass, float64 (K, K); see `MutualInformation.result`."""
    names = ("pair", "code", "count")

    def run(ids: list[str], attributes: list[Attributes]) -> pa.Table:
        counted = MutualInformation(vocabularies)
        counted.add(ItemFeatures.of(ids, attributes, vocabularies))
        pairs = [np.full(len(codes), number) for number, (codes, _) in enumerate(counted.counts)]
        empty = (np.zeros(0, dtype=np.int64),) * 2
        columns = (np.concatenate(column) for column in zip(*(counted.counts or [empty]), strict=True))
        return pa.table([np.concatenate(pairs or [empty[0]]), *columns], names=names)

    total = MutualInformation(vocabularies)
    for table in _run_blocks(run, blocks):
        pair, code, count = (table[name].to_numpy() for name in names)
        total.merge([(code[pair == number], count[pair == number]) for number in range(len(total.counts))])
    return total.result()


def _run_blocks(run: Callable[[list[str], list[Attributes]], pa.Table], blocks: Sequence[Block]) -> Iterator[pa.Table]:
    """Results of all blocks in any order, each with its number in a column `block`."""

    def task(row: Any) -> pa.Table:
        number = int(row["id"][0])
        file, group = blocks[number]
        items = pq.ParquetFile(file).read_row_group(group, ["item_id", "text"], use_threads=False)
        table = run(items["item_id"].to_pylist(), [parse_attributes(text) for text in items["text"].to_pylist()])
        return table.append_column("block", pa.array(np.full(table.num_rows, number)))

    results = ray.data.range(len(blocks), override_num_blocks=len(blocks)).map_batches(task, batch_size=1)
    yield from results.iter_batches(batch_size=None, batch_format="pyarrow")
