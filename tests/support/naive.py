"""Reference of ingest in plain Python: loops over dicts, whole data set in memory, no cleverness."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from userrep.data.assemble import items_file, users_file

Seen = tuple[str, int | None, float | None]  # item id, time, value of one event
Histories = dict[str, list[Seen]]  # by service


class Ingested(NamedTuple):
    users: dict[str, Histories]
    unknown: set[tuple[str, int]]  # (file, line) of events whose item is not in the items
    num_duplicates: int


def ingest(events: list[dict[str, Any]], item_ids: set[str]) -> Ingested:
    """What the shards must hold, from events in source order."""
    unknown = {(event["file"], event["line"]) for event in events if event["item_id"] not in item_ids}
    known = [event for event in events if event["item_id"] in item_ids]
    # Of events that are the same one, the first by position counts; sorted() keeps the source order of ties.
    distinct: dict[tuple[Any, ...], dict[str, Any]] = {}
    for event in sorted(known, key=lambda event: event["position"] or 0):
        told_apart_by = event["time"] if event["time"] is not None else ("position", event["position"])
        distinct.setdefault((event["user_id"], event["item_id"], event["service"], told_apart_by), event)
    kept = {id(event) for event in distinct.values()}
    users: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for event in known:
        if id(event) in kept:
            users[event["user_id"]][event["service"]].append(event)
    for histories in users.values():
        for history in histories.values():
            history.sort(key=lambda event: (event["time"] is not None, event["time"] or 0, event["position"] or 0))
    return Ingested(
        {
            user: {
                service: [(event["item_id"], event["time"], event["value"]) for event in history]
                for service, history in histories.items()
            }
            for user, histories in users.items()
        },
        unknown,
        len(known) - len(kept),
    )


class ShardUser(NamedTuple):
    shard: int
    row_group: int
    split: int
    histories: Histories
    labels: dict[str, str]


def read_shards(directory: Path, shards: list[dict[str, Any]], services: list[str]) -> dict[str, ShardUser]:
    """All users of shard files, with their references resolved; each user may stand only once."""
    found: dict[str, ShardUser] = {}
    for shard in (facts["shard"] for facts in shards):
        users = pq.ParquetFile(directory / users_file(shard))
        items = pq.ParquetFile(directory / items_file(shard))
        assert users.num_row_groups == items.num_row_groups
        for group in range(users.num_row_groups):
            item_ids = items.read_row_group(group)["item_id"].to_pylist()
            assert len(set(item_ids)) == len(item_ids), "an item stands twice in one dictionary"
            referred: set[int] = set()
            for row in users.read_row_group(group).to_pylist():
                assert row["user_id"] not in found, "a user stands twice"
                assert [entry["service"] for entry in row["histories"]] == sorted(
                    {entry["service"] for entry in row["histories"]}
                )
                histories = {
                    services[entry["service"]]: [
                        (item_ids[item], time, value)
                        for item, time, value in zip(entry["items"], entry["times"], entry["values"], strict=True)
                    ]
                    for entry in row["histories"]
                }
                referred |= {item for entry in row["histories"] for item in entry["items"]}
                found[row["user_id"]] = ShardUser(shard, group, row["split"], histories, dict(row["labels"]))
            assert referred == set(range(len(item_ids))), "a dictionary holds an item that nobody refers to"
    return found


def read_item_texts(directory: Path, shards: list[dict[str, Any]]) -> dict[str, str]:
    """Text of every item in the dictionaries; the same item has the same text everywhere."""
    texts: dict[str, str] = {}
    for facts in shards:
        table = pq.read_table(directory / items_file(facts["shard"]))
        for item, text in zip(table["item_id"].to_pylist(), table["text"].to_pylist(), strict=True):
            assert texts.setdefault(item, text) == text
    return texts


def read_quarantine(directory: Path) -> list[dict[str, Any]]:
    """All records of a quarantine directory; none when it is absent."""
    records = []
    for path in sorted(directory.glob("*.jsonl")):
        with path.open(encoding="utf-8", newline="\n") as stream:
            records += [json.loads(line) for line in stream]
    return records


def places(records: list[dict[str, Any]]) -> list[tuple[str, str, int, str]]:
    """(table, file, line, reason) of quarantined records, sorted."""
    return sorted((record["table"], record["file"], record["line"], record["reason"]) for record in records)


def count_samples(users: list[ShardUser]) -> dict[str, dict[str, int]]:
    """Samples that users offer, per split and kind."""
    counts = {split: {"service": 0, "time": 0, "mixed": 0, "next_item": 0} for split in ("train", "validation", "test")}
    for user in users:
        split = ("train", "validation", "test")[user.split]
        counts[split]["next_item"] += sum(len(history) >= 2 for history in user.histories.values())
        counts[split]["mixed"] += sum(map(len, user.histories.values())) >= 2
        for index, service in enumerate(user.histories):
            counts[split]["time"] += len(user.histories[service]) >= 2
            counts[split]["service"] += len(list(user.histories)[index + 1 :])
    return counts
