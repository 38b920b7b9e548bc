"""Raw data of a source -> validated, self-contained Parquet shards, as Ray Data tasks.

Both passes are bounded in memory by one part or one shard, and the driver holds only counts:
1. `parse_source` reads every part of the source once (`data/parse.py`);
2. `assemble_shards` turns every bucket of users into a shard (`data/assemble.py`).
A task writes files named after its part or bucket, so a retried task overwrites instead of duplicating.
The caller owns the directory and commits it (`table_versions.staged_table`).
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from pydantic import Field
from tokenizers import Tokenizer

from userrep import schema, storage
from userrep.config import Config
from userrep.data.assemble import assemble_shard, items_file, users_file
from userrep.data.key_values import KEY_FLAG, KeyValueConfig
from userrep.data.parse import ITEMS, QUARANTINE, SPILL, parse_part
from userrep.data.sources.source import Part, Source, TableName
from userrep.data.split import SplitConfig
from userrep.data.tokenizer import open_item_tokenizer, write_idf

Progress = Callable[[int, int, int], None]  # tasks done, tasks in all, rows done
TABLES: tuple[TableName, ...] = ("items", "users", "events")


class IngestConfig(Config):
    """How raw records become shards."""

    num_shards: int = Field(default=16, ge=1)  # one is in memory while it is built; 10k to 1M events each suit
    row_group_size: int = Field(default=1024, ge=1)  # users; the unit of shuffling and of reading
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)  # of the records of each table
    split: SplitConfig = SplitConfig()


class TooManyBadRecordsError(ValueError):
    """More records are unusable than the config allows."""


def parse_source(source: Source, num_shards: int, directory: Path, progress: Progress) -> dict[str, dict[str, int]]:
    """First pass: items, spilled events and labels, quarantine. Returns `records` and `rejected` per table."""
    tasks: list[tuple[TableName, int, Part]] = []
    for table in TABLES:
        tasks.extend((table, index, part) for index, part in enumerate(source.parts(table)))

    def run(task: int) -> dict[str, Any]:
        table, index, part = tasks[task]
        storage.receive(Path(getattr(source, "path", "")), "*")
        records, rejected = parse_part(table, index, part, directory, num_shards)
        rows = f"{ITEMS}/part-{index:05d}.*" if table == "items" else f"{SPILL}/{table}/*/part-{index:05d}.*"
        storage.send(directory, rows, f"{QUARANTINE}/{table}-{index:05d}.jsonl")
        return {"table": table, "rows": records, "rejected": rejected}

    counts = {str(table): {"records": 0, "rejected": 0} for table in TABLES}
    for result in run_tasks(run, len(tasks), progress):
        counts[result["table"]]["records"] += result["rows"]
        counts[result["table"]]["rejected"] += result["rejected"]
    return counts


def assemble_shards(
    services: list[str], config: IngestConfig, directory: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Second pass: one shard per bucket. Returns the facts of every shard, in shard order."""

    def run(bucket: int) -> dict[str, Any]:
        storage.receive(directory, f"{SPILL}/*/bucket-{bucket:05d}/*", f"{ITEMS}/*", f"{QUARANTINE}/items-*")
        facts = assemble_shard(bucket, services, directory, config.row_group_size, config.split)
        quarantine = f"{QUARANTINE}/events-unknown-item-{bucket:05d}.jsonl"
        storage.send(directory, users_file(bucket), items_file(bucket), quarantine)
        return {"rows": facts["events"], **facts}

    return run_tasks(run, config.num_shards, progress)


def check_bad_fraction(counts: dict[str, dict[str, int]], limit: float, quarantine: str) -> None:
    """Refuses a data set with too many bad records in any of its tables.

    Raises:
        TooManyBadRecordsError: names table, counts, limit, and where the records with their reasons lie.
    """
    for table, count in counts.items():
        fraction = count["rejected"] / max(1, count["records"])
        if fraction > limit:
            raise TooManyBadRecordsError(
                f"{count['rejected']:,} of {count['records']:,} {table} records are bad ({fraction:.2%}), "
                f"more than max_bad_fraction={limit:.2%}. They stand with file, line and reason in {quarantine}. "
                "Repair the source, or raise ingest.max_bad_fraction"
            )


def tokenize_shards(
    source: Path,
    target: Path,
    shards: list[dict[str, Any]],
    tokenizer_path: Path,
    attributes: KeyValueConfig | None,
    progress: Progress,
) -> int:
    """Writes the shards of `source` to `target` with token ids instead of texts, and the tokens' document frequencies.

    Args:
        source: directory of an ingested table.
        target: directory to write to.
        shards: shard facts of the source's manifest.
        tokenizer_path: tokenizer.json, in `target`.
        attributes: as in `TokenizeConfig`.
        progress: called in the driver as shards are done.

    Returns:
        The number of tokens written.
    """

    def run(index: int) -> dict[str, Any]:
        shard = shards[index]["shard"]
        storage.fetch(source)
        storage.receive(target, tokenizer_path.name)
        link_or_copy(source / users_file(shard), target / users_file(shard))
        counts = _tokenize_items(source / items_file(shard), target / items_file(shard), tokenizer_path, attributes)
        storage.send(target, users_file(shard), items_file(shard))
        return counts

    storage.send(target, tokenizer_path.name)
    results = run_tasks(run, len(shards), progress)
    document_counts = np.sum([result["document_counts"] for result in results], axis=0)
    write_idf(target, document_counts, sum(result["rows"] for result in results))
    return sum(result["tokens"] for result in results)


def _tokenize_items(
    source: Path, target: Path, tokenizer_path: Path, attributes: KeyValueConfig | None
) -> dict[str, Any]:
    encode, texts = open_item_tokenizer(tokenizer_path, attributes), pq.ParquetFile(source)
    document_counts = np.zeros(Tokenizer.from_file(str(tokenizer_path)).get_vocab_size(), dtype=np.int64)
    num_items = num_tokens = 0
    known: dict[
        str, Sequence[int] | np.ndarray
    ] = {}  # an item is in the dictionary of most row groups, and is tokenized once
    with pq.ParquetWriter(target, schema.SHARD_ITEMS, compression="zstd") as writer:
        for group in range(texts.num_row_groups):
            table = texts.read_row_group(group)
            items = table["text"].to_pylist()
            new = [text for text in dict.fromkeys(items) if text not in known]
            known.update(zip(new, encode(new), strict=True))
            tokens = pa.array([known[text] for text in items], type=pa.list_(pa.int32()))
            writer.write_table(
                table.select(["item_id"]).append_column(schema.SHARD_ITEMS.field("tokens"), tokens),
                row_group_size=max(1, table.num_rows),
            )
            ids = tokens.values.to_numpy() & ~KEY_FLAG
            pairs = np.unique(np.stack([pc.list_parent_indices(tokens).to_numpy(), ids]), axis=1)
            document_counts += np.bincount(pairs[1], minlength=len(document_counts))
            num_items += table.num_rows
            num_tokens += len(tokens.values)
    return {"rows": num_items, "tokens": num_tokens, "document_counts": document_counts.tolist()}


def link_or_copy(source: Path, target: Path) -> None:
    """Makes an immutable file appear in a second table: a hard link where the file system has them, else a copy."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def run_tasks(run: Callable[[int], dict[str, Any]], num_tasks: int, progress: Progress) -> list[dict[str, Any]]:
    """Runs `run(0) ... run(num_tasks - 1)` as Ray Data tasks.

    Args:
        run: picklable; returns a JSON-plain dict whose `rows` is what the task processed.
        num_tasks: how many.
        progress: called in the driver as tasks finish.

    Returns:
        The results in task order. They pass through Ray Data as JSON, so a varying shape is no schema conflict.
    """
    if num_tasks == 0:
        return []

    def run_row(row: dict[str, Any]) -> dict[str, Any]:
        return {"task": row["id"], "result": json.dumps(run(int(row["id"])))}

    results: dict[int, dict[str, Any]] = {}
    done_rows = 0
    for row in ray.data.range(num_tasks, override_num_blocks=num_tasks).map(run_row).iter_rows():
        result = json.loads(row["result"])
        results[int(row["task"])] = result
        done_rows += result["rows"]
        progress(len(results), num_tasks, done_rows)
    return [results[task] for task in range(num_tasks)]
