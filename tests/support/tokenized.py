"""Shards as lists and dicts, written to files row by row, and what samples of them must look like."""

from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from userrep.data.assemble import items_file, users_file
from userrep.data.split import SPLITS
from userrep.manifest import Manifest, write_manifest
from userrep.schema import SHARD_ITEMS, SHARD_ITEMS_TEXT, SHARD_USERS

Event = tuple[str, int | None]  # item id, time


class User(NamedTuple):
    user_id: str
    split: str
    histories: dict[int, list[Event]]  # by service index, ascending; oldest event first
    labels: tuple[tuple[str, str], ...] = ()  # of the profile


Group = list[User]
View = list[Event]


def item_tokens(item_id: str) -> list[int]:
    """Tokens of an item, a function of its id; their number varies from 1 to 5."""
    seed = sum(map(ord, item_id))
    return [seed * 7 % 1000 + place for place in range(1 + seed % 5)]


@st.composite
def groups(draw: st.DrawFn, first_user: int = 0, min_users: int = 1, max_users: int = 6) -> Group:
    """A row group of up to `max_users` users with up to 3 services; few items, so that they repeat."""
    users = []
    for number in range(draw(st.integers(min_users, max_users))):
        services = sorted(draw(st.sets(st.integers(0, 2), min_size=1)))
        histories = {}
        for service in services:
            items = draw(st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=6))
            histories[service] = [(item, draw(st.none() | st.just(100 + place))) for place, item in enumerate(items)]
        split = draw(st.sampled_from([*SPLITS, "train"]))
        users.append(User(f"user {first_user + number}", split, histories))
    return users


@st.composite
def tables(draw: st.DrawFn, max_groups: int = 4) -> list[list[Group]]:
    """Row groups of several shards, one of them possibly without any."""
    shards: list[list[Group]] = []
    next_user = 0
    for _ in range(draw(st.integers(1, 3))):
        shards.append([])
        for _ in range(draw(st.integers(0, max_groups))):
            shards[-1].append(draw(groups(next_user)))
            next_user += len(shards[-1][-1])
    return shards


def item_text(item_id: str) -> str:
    """Text of an item, a function of its id."""
    return f"text of {item_id}"


def write_shards(directory: Path, shards: list[list[Group]], has_tokens: bool = True) -> list[dict[str, Any]]:
    """Writes every shard by plain lists of rows, with tokens of the items or, as they are ingested, with texts.

    Returns the facts that a manifest would hold.
    """
    directory.mkdir(parents=True, exist_ok=True)
    return [_write_shard(directory, number, row_groups, has_tokens) for number, row_groups in enumerate(shards)]


def write_ingested(directory: Path, services: list[str], shards: list[list[Group]]) -> None:
    """A committed table of shards as they are ingested."""
    facts = {"services": services, "shards": write_shards(directory, shards, has_tokens=False)}
    write_manifest(directory, Manifest(table="shards_text", stage="ingest", config={}, facts=facts))


def _write_shard(directory: Path, shard: int, row_groups: list[Group], has_tokens: bool) -> dict[str, Any]:
    facts, items_schema = [], SHARD_ITEMS if has_tokens else SHARD_ITEMS_TEXT
    with (
        pq.ParquetWriter(directory / users_file(shard), SHARD_USERS) as users_writer,
        pq.ParquetWriter(directory / items_file(shard), items_schema) as items_writer,
    ):
        for group in row_groups:
            dictionary = sorted({item for user in group for view in user.histories.values() for item, _ in view})
            users = [
                {
                    "user_id": user.user_id,
                    "split": SPLITS.index(user.split),
                    "histories": [
                        {
                            "service": service,
                            "items": [dictionary.index(item) for item, _ in view],
                            "times": [time for _, time in view],
                            "values": [None] * len(view),
                        }
                        for service, view in user.histories.items()
                    ],
                    "labels": list(user.labels),
                }
                for user in group
            ]
            of_item = {"tokens": item_tokens} if has_tokens else {"text": item_text}
            items = [{"item_id": item, **{name: of(item) for name, of in of_item.items()}} for item in dictionary]
            users_writer.write_table(pa.Table.from_pylist(users, schema=SHARD_USERS))
            items_writer.write_table(pa.Table.from_pylist(items, schema=items_schema))
            samples = {
                split: {
                    kind: len(list_samples(group, (kind,), split)) for kind in ("service", "time", "mixed", "next_item")
                }
                for split in SPLITS
            }
            facts.append({"rows": len(group), "items": len(dictionary), "samples": samples})
    return {"shard": shard, "users": sum(fact["rows"] for fact in facts), "row_groups": facts}


def list_samples(group: Group, kinds: tuple[str, ...], split: str) -> list[tuple[str, View, View]]:
    """(user id, anchor, positive) of every sample, whole views."""
    found = []
    for user in group:
        if user.split != split:
            continue
        views = list(user.histories.values())
        for kind in kinds:
            if kind == "service":
                found += [(user.user_id, one, other) for n, one in enumerate(views) for other in views[n + 1 :]]
            else:
                whole = [[event for view in views for event in view]] if kind == "mixed" else views
                cut = -1 if kind == "next_item" else None
                found += [
                    (user.user_id, view[: cut or len(view) // 2], view[cut or len(view) // 2 :])
                    for view in whole
                    if len(view) >= 2
                ]
    return found


def token_texts(view: View) -> list[list[int]]:
    """Token ids of every event of a view."""
    return [item_tokens(item) for item, _ in view]
