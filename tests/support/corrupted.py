"""A small data set written as files, with bad records in between whose places are known."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from userrep.data.sources.delimited import DelimitedSource, EventFiles, UserFiles
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.source import TableName
from userrep.data.sources.synthetic import SyntheticSource

Record = dict[str, Any]
Place = tuple[str, str, int, str]  # table, file, line, reason

SYNTHETIC = SyntheticSource(num_users=100, num_items=100, num_topics=8, events_per_user=6.0)
BAD_EVENTS: list[tuple[str, Record]] = [
    ("missing_id", {"user_id": None}),
    ("missing_id", {"item_id": " "}),
    ("bad_time", {"timestamp": -1.0}),
    ("non_finite_value", {"value": float("inf")}),
    ("unknown_item", {"item_id": "shop-of-another-world"}),
    ("unknown_service", {"service": "weather"}),
]


class DataSet(NamedTuple):
    source: DelimitedSource | ParquetSource
    events: list[Record]  # good ones in source order, as in schema.EVENTS
    item_ids: set[str]
    labels: dict[str, dict[str, str]]
    bad: list[Place]  # sorted


def clean_records(table: TableName) -> list[Record]:
    """Records of the synthetic source, as plain columns."""
    rows = [row for part in SYNTHETIC.parts(table) for parsed in part() for row in parsed.rows.to_pylist()]
    if table == "items":
        return [{"item_id": row["item_id"], "title": row["text"]} for row in rows]
    if table == "users":
        return [{"user_id": row["user_id"], **dict(row["labels"])} for row in rows]
    names = {"user_id": "user_id", "item_id": "item_id", "service": "service", "time": "timestamp", "value": "value"}
    return [{column: row[name] for name, column in names.items()} for row in rows]


def corrupt(records: list[Record], bad: list[tuple[str, Any]], seed: int) -> list[tuple[str | None, Any]]:
    """The records in their order with the bad ones at random places among them: (reason or None, record)."""
    mixed: list[tuple[str | None, Any]] = [(None, record) for record in records]
    rng = random.Random(seed)
    for entry in bad:
        mixed.insert(rng.randrange(len(mixed) + 1), entry)
    return mixed


def num_bad(num_good: int, fraction: float) -> int:
    """The largest number of bad records that is at most `fraction` of all."""
    return int(fraction * num_good / (1 - fraction) + 1e-9)


def cycle(kinds: list[tuple[str, Any]], count: int) -> list[tuple[str, Any]]:
    return [kinds[number % len(kinds)] for number in range(count)]


def bad_events(events: list[Record], extra: list[tuple[str, Any]], fraction: float) -> list[tuple[str, Any]]:
    kinds = [*((reason, {**events[0], **change}) for reason, change in BAD_EVENTS), *extra]
    return cycle(kinds, num_bad(len(events), fraction))


def write_jsonl(folder: Path, fraction: float) -> DataSet:
    """Events, items and users as JSON lines; `fraction` of the events and of the items are bad."""
    whole = {table: clean_records(table) for table in ("events", "items", "users")}
    broken: list[tuple[str, Any]] = [
        ("broken_line", b'{"user_id": "u", "item'),
        ("bad_encoding", b'{"user_id": "\xff"}'),
    ]
    empty = ("empty_text", {"item_id": "shop-9999999", "title": " "})
    mixed = {
        "events": corrupt(whole["events"], bad_events(whole["events"], broken, fraction), seed=1),
        "items": corrupt(whole["items"], cycle([empty, *broken], num_bad(len(whole["items"]), fraction)), seed=2),
        "users": corrupt(whole["users"], [], seed=3),
    }
    for table, records in mixed.items():
        lines = [
            record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()
            for _, record in records
        ]
        (folder / f"{table}.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    source = DelimitedSource(
        path=folder,
        events=EventFiles(files="events.jsonl", service="service", value="value"),
        users=UserFiles(files="users.jsonl"),
        service_names=("search", "shop"),
    )
    return _data_set(source, mixed, whole, lambda table: f"{table}.jsonl")


def write_parquet(folder: Path, fraction: float) -> DataSet:
    """The same as Parquet; an id of bytes that are no UTF-8 stands for the wrong encoding."""
    whole = {table: clean_records(table) for table in ("events", "items", "users")}
    undecodable = ("bad_encoding", {**whole["events"][0], "user_id": b"\xff\xfe"})
    empty = ("empty_text", {"item_id": "shop-9999999", "title": ""})
    mixed = {
        "events": corrupt(whole["events"], bad_events(whole["events"], [undecodable], fraction), seed=1),
        "items": corrupt(whole["items"], cycle([empty], num_bad(len(whole["items"]), fraction)), seed=2),
        "users": corrupt(whole["users"], [], seed=3),
    }
    for table, records in mixed.items():
        names = list(whole[table][0])
        columns = {name: [record[name] for _, record in records] for name in names}
        arrays = {name: _binary(values) if name == "user_id" else pa.array(values) for name, values in columns.items()}
        pq.write_table(pa.table(arrays), folder / f"{table}.parquet", row_group_size=100)
    source = ParquetSource(path=folder, service_names=("search", "shop"))
    return _data_set(source, mixed, whole, lambda table: f"{table}.parquet")


def _binary(values: list[Any]) -> pa.Array:
    return pa.array([value.encode() if isinstance(value, str) else value for value in values], pa.binary())


def _data_set(
    source: DelimitedSource | ParquetSource,
    mixed: dict[str, list[tuple[str | None, Any]]],
    whole: dict[str, list[Record]],
    file_of: Callable[[str], str],
) -> DataSet:
    bad = [
        (table, file_of(table), line, reason)
        for table, records in mixed.items()
        for line, (reason, _) in enumerate(records, 1)
        if reason is not None
    ]
    events = [
        {
            "user_id": record["user_id"],
            "item_id": record["item_id"],
            "service": record["service"],
            "time": record["timestamp"],
            "position": None,
            "value": record["value"],
            "file": file_of("events"),
            "line": line,
        }
        for line, (reason, record) in enumerate(mixed["events"], 1)
        if reason is None
    ]
    labels = {record["user_id"]: {k: v for k, v in record.items() if k != "user_id"} for record in whole["users"]}
    return DataSet(source, events, {record["item_id"] for record in whole["items"]}, labels, sorted(bad))
