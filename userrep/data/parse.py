"""First pass of ingest: one part of a source -> items, spilled events and labels by user bucket, quarantine."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userrep import schema
from userrep.data.sources.source import Part, TableName
from userrep.data.split import assign_buckets, id_keys

SPILL = "spill"
QUARANTINE = "quarantine"
ITEMS = "items"


def parse_part(table: TableName, index: int, part: Part, directory: Path, num_buckets: int) -> tuple[int, int]:
    """Reads one part to the end and writes what it holds; memory is bounded by the part's own batches.

    Files are named after the part, so running it again overwrites them.

    Args:
        table: which table the part belongs to.
        index: number of the part within its table.
        part: yields batches of good and rejected records.
        directory: staging directory of the ingest stage.
        num_buckets: number of shards.

    Returns:
        The numbers of records read and of records rejected.
    """
    records = rejected = 0
    with ExitStack() as stack:
        sink = (
            _ItemSink(directory, index, stack)
            if table == "items"
            else _BucketSink(table, directory, index, num_buckets, stack)
        )
        quarantine = QuarantineWriter(directory, f"{table}-{index:05d}", stack)
        for parsed in part():
            sink.write(parsed.rows)
            quarantine.write(parsed.rejected)
            records += parsed.rows.num_rows + parsed.rejected.num_rows
            rejected += parsed.rejected.num_rows
    return records, rejected


class QuarantineWriter:
    """Appends rejected records to one JSON-lines file, which is created by the first of them."""

    def __init__(self, directory: Path, name: str, stack: ExitStack) -> None:
        self._path = directory / QUARANTINE / f"{name}.jsonl"
        self._path.unlink(missing_ok=True)
        self._stack = stack
        self._stream: Any = None

    def write(self, rejected: pa.Table) -> None:
        """Writes records of `schema.REJECTED`, one JSON object per line."""
        if rejected.num_rows and self._stream is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = self._stack.enter_context(self._path.open("w", encoding="utf-8"))
        for row in rejected.to_pylist():
            self._stream.write(json.dumps(row, ensure_ascii=False) + "\n")


class _ItemSink:
    def __init__(self, directory: Path, index: int, stack: ExitStack) -> None:
        path = directory / ITEMS / f"part-{index:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = stack.enter_context(pq.ParquetWriter(path, schema.ITEMS, compression="zstd"))

    def write(self, rows: pa.Table) -> None:
        if rows.num_rows:
            self._writer.write_table(rows)


class _BucketSink:
    """One Arrow stream per user bucket, opened when its first row arrives."""

    def __init__(self, table: TableName, directory: Path, index: int, num_buckets: int, stack: ExitStack) -> None:
        self._directory = directory / SPILL / table
        self._index = index
        self._num_buckets = num_buckets
        self._stack = stack
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
        for path in self._directory.glob(f"bucket-*/part-{index:05d}.arrow"):
            path.unlink()  # left by an interrupted attempt

    def write(self, rows: pa.Table) -> None:
        if not rows.num_rows:
            return
        buckets = assign_buckets(id_keys(rows["user_id"]), self._num_buckets)
        order = np.argsort(buckets, kind="stable")
        grouped = rows.take(pa.array(order))
        present, starts = np.unique(buckets[order], return_index=True)
        for bucket, start, end in zip(present, starts, [*starts[1:], len(order)], strict=True):
            self._writer(int(bucket), rows.schema).write_table(grouped.slice(start, end - start))

    def _writer(self, bucket: int, schema_: pa.Schema) -> pa.ipc.RecordBatchStreamWriter:
        if bucket not in self._writers:
            path = self._directory / f"bucket-{bucket:05d}" / f"part-{self._index:05d}.arrow"
            path.parent.mkdir(parents=True, exist_ok=True)
            sink = self._stack.enter_context(pa.OSFile(str(path), "wb"))
            self._writers[bucket] = self._stack.enter_context(pa.ipc.new_stream(sink, schema_))
        return self._writers[bucket]


def read_rejected_item_ids(directory: Path) -> set[str]:
    """Ids of the item records in quarantine, where they could be read."""
    ids = set()
    for path in (directory / QUARANTINE).glob("items-*.jsonl"):
        with path.open(encoding="utf-8") as lines:
            ids |= {json.loads(line)["id"] for line in lines}
    return ids - {None}


def read_spill(directory: Path, table: TableName, bucket: int) -> pa.Table:
    """All rows of one bucket, in the order of the source's parts; empty when the bucket has none."""
    empty = (schema.EVENTS if table == "events" else schema.USERS).empty_table()
    tables = [empty]
    for path in sorted((directory / SPILL / table / f"bucket-{bucket:05d}").glob("part-*.arrow")):
        with pa.OSFile(str(path), "rb") as source:
            tables.append(pa.ipc.open_stream(source).read_all())
    return pa.concat_tables(tables)
