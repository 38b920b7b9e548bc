import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support import naive
from tests.support.memory_source import MemorySource, assemble, event, item
from userrep.data.assemble import assemble_shard, items_file, users_file
from userrep.data.parse import QUARANTINE
from userrep.data.split import SPLITS, SplitConfig, assign_buckets, assign_splits, id_keys
from userrep.schema import SHARD_ITEMS_TEXT, SHARD_USERS

SERVICES = ("search", "shop", "music")
# Ids that a careless comparison takes for each other: case, composed and decomposed accents, inner spaces, NUL.
USERS = ["u", "U", "u ", "u\0", "\u00e9", "e\u0301", "사용자", "\U0001f600", "0", "00", "u" * 300]
ITEMS = ["i", "I", "i\0", "i\0\0", "아이템", "\U0001f4a1", "1", "1.0"]
NEVER = "not among the items"

EVENT = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(USERS),
        "item_id": st.sampled_from([*ITEMS, *ITEMS, NEVER]),
        "service": st.sampled_from(SERVICES),
        "when": st.tuples(st.none(), st.integers(-2, 3)) | st.tuples(st.integers(0, 4), st.none() | st.integers(-2, 3)),
        "value": st.none() | st.floats(-4, 4, width=32),
    }
)


@st.composite
def chunked(draw: st.DrawFn, records: list[Any]) -> list[list[list[Any]]]:
    """The records in order, cut into parts of batches, some of them empty."""
    parts: list[list[list[Any]]] = [[[]]]
    for record in records:
        cut = draw(st.sampled_from(["", "", "", "batch", "part"]))
        if cut == "part":
            parts.append([[]])
        elif cut == "batch":
            parts[-1].append([])
        parts[-1][-1].append(record)
    return parts


@st.composite
def sources(draw: st.DrawFn) -> MemorySource:
    drawn = draw(st.lists(EVENT, max_size=60))
    events = []
    for line, record in enumerate(drawn, 1):
        time, position = record.pop("when")
        events.append({**record, "time": time, "position": position, "file": f"f{line % 3}", "line": line})
    texts = [item(item_id, line=line) for line, item_id in enumerate(draw(st.permutations(ITEMS)))]
    again = [item(item_id, text="a second text") for item_id in draw(st.lists(st.sampled_from(ITEMS), max_size=3))]
    profiles = [
        {"user_id": user, "labels": [("age", f"{number}"), ("gender", "f")], "file": "users", "line": number}
        for number, user in enumerate(draw(st.lists(st.sampled_from(USERS), unique=True)))
    ]
    return MemorySource(SERVICES, draw(chunked([*texts, *again])), draw(chunked(events)), draw(chunked(profiles)))


def flat(parts: list[list[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    return [record for part in parts for batch in part for record in batch]


def one_part(*records: dict[str, Any]) -> list[list[list[dict[str, Any]]]]:
    return [[list(records)]]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sources(), st.integers(1, 4), st.integers(1, 4))
@example(MemorySource(SERVICES, [], [], []), 2, 1)
@example(
    MemorySource(
        SERVICES,
        one_part(item("i"), item("i\0")),
        one_part(*(event(user, what, 1, service="shop") for user in ("u", "u\0") for what in ("i", "i\0"))),
        [],
    ),
    1,
    1,
)
def test_shards_hold_what_the_reference_holds(source: MemorySource, num_shards: int, row_group_size: int):
    with TemporaryDirectory() as directory:
        check_against_reference(source, num_shards, row_group_size, Path(directory))


def check_against_reference(source: MemorySource, num_shards: int, row_group_size: int, directory: Path) -> None:
    counts, shards = assemble(source, directory, num_shards, row_group_size)
    events = flat(source.events)
    expected = naive.ingest(events, set(ITEMS) if source.items else set())

    users = naive.read_shards(directory, shards, list(SERVICES))
    assert {user: found.histories for user, found in users.items()} == expected.users
    labels = {record["user_id"]: dict(record["labels"]) for record in flat(source.users)}
    assert {user: found.labels for user, found in users.items()} == {
        user: labels.get(user, {}) for user in expected.users
    }
    used = {what for histories in expected.users.values() for seen in histories.values() for what, _, _ in seen}
    # Of two records of one item the first counts.
    assert naive.read_item_texts(directory, shards) == {what: f"text of {what}" for what in used}

    quarantined = naive.read_quarantine(directory / QUARANTINE)
    assert naive.places(quarantined) == sorted(
        ("events", file, line, "unknown_item") for file, line in expected.unknown
    )
    assert all(NEVER in record["record"] for record in quarantined)

    assert counts["events"] == {"records": len(events), "rejected": 0}
    assert [shard["shard"] for shard in shards] == list(range(num_shards))
    assert sum(shard["users"] for shard in shards) == len(expected.users)
    assert sum(shard["events"] for shard in shards) == sum(
        len(seen) for histories in expected.users.values() for seen in histories.values()
    )
    assert sum(shard["duplicates"] for shard in shards) == expected.num_duplicates
    assert sum(shard["unknown_item"] for shard in shards) == len(expected.unknown)
    for shard in shards:
        assert [group["rows"] for group in shard["row_groups"][:-1]] == [row_group_size] * (
            len(shard["row_groups"]) - 1
        )
        for number, group in enumerate(shard["row_groups"]):
            mine = [user for user in users.values() if (user.shard, user.row_group) == (shard["shard"], number)]
            assert group["rows"] == len(mine)
            assert group["samples"] == naive.count_samples(mine)
            assert group["items"] == len({seen for user in mine for h in user.histories.values() for seen, _, _ in h})
    keys = id_keys(pa.array(list(users), pa.string()))
    assert [user.shard for user in users.values()] == assign_buckets(keys, num_shards).tolist()
    assert [user.split for user in users.values()] == assign_splits(keys, SplitConfig()).tolist()


def test_a_tie_of_time_and_position_keeps_the_order_of_the_source(tmp_path: Path):
    names = [f"i{number}" for number in range(20)]
    events = [event("u", name, line, time=7) for line, name in enumerate(reversed(names), 1)]
    source = MemorySource(("a",), one_part(*map(item, names)), [[events[:7], events[7:9]], [events[9:]]], [])
    _, shards = assemble(source, tmp_path, 1, 8)
    assert [what for what, _, _ in naive.read_shards(tmp_path, shards, ["a"])["u"].histories["a"]] == names[::-1]


def test_of_equal_events_the_first_keeps_its_value(tmp_path: Path):
    events = [event("u", "i", line, time=7, value=float(line)) for line in (1, 2, 3)]
    source = MemorySource(("a",), one_part(item("i")), one_part(*events), [])
    _, shards = assemble(source, tmp_path, 1, 8)
    assert naive.read_shards(tmp_path, shards, ["a"])["u"].histories == {"a": [("i", 7, 1.0)]}
    assert shards[0]["duplicates"] == 2


def test_shards_without_users_are_readable(tmp_path: Path):
    source = MemorySource(("a",), one_part(item("i")), one_part(event("lonely", "i", 1)), [])
    _, shards = assemble(source, tmp_path, 5, 8)
    empty = [shard["shard"] for shard in shards if not shard["users"]]
    assert len(empty) == 4
    for shard in empty:
        users, items = pq.read_table(tmp_path / users_file(shard)), pq.read_table(tmp_path / items_file(shard))
        assert (users.num_rows, items.num_rows) == (0, 0)
        assert users.schema.equals(SHARD_USERS)
        assert items.schema.equals(SHARD_ITEMS_TEXT)
        assert shards[shard]["row_groups"] == []


def test_files_have_the_declared_schema(tmp_path: Path):
    source = MemorySource(("a",), one_part(item("i")), one_part(event("u", "i", 1)), [])
    assemble(source, tmp_path, 1, 8)
    for path, schema in ((users_file(0), SHARD_USERS), (items_file(0), SHARD_ITEMS_TEXT)):
        written = pq.read_schema(tmp_path / path)
        assert written.equals(schema)
        assert [field.metadata for field in written] == [field.metadata for field in schema]


def test_assembling_again_gives_the_same_bytes_and_no_second_quarantine_record(tmp_path: Path):
    events = [event(f"u{line % 5}", f"i{line % 7}", line) for line in range(40)]
    source = MemorySource(("a",), one_part(*(item(f"i{number}") for number in range(6))), one_part(*events), [])
    _, shards = assemble(source, tmp_path, 1, 2)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = assemble_shard(0, ["a"], tmp_path, 2, SplitConfig())
    after = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert json.dumps(again) == json.dumps({key: value for key, value in shards[0].items() if key != "rows"})
    assert after == before


def test_a_user_is_in_one_split_whatever_the_sharding(tmp_path: Path):
    events = [event(f"user {number}", "i", number) for number in range(200)]
    source = MemorySource(("a",), one_part(item("i")), one_part(*events), [])
    splits = []
    for num_shards, row_group_size in ((1, 1000), (7, 3)):
        directory = tmp_path / str(num_shards)
        _, shards = assemble(source, directory, num_shards, row_group_size)
        users = naive.read_shards(directory, shards, ["a"])
        splits.append({user: found.split for user, found in users.items()})
    assert splits[0] == splits[1]
    assert set(splits[0].values()) == set(range(len(SPLITS)))


def test_users_whose_keys_collide_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("userrep.data.assemble.id_keys", lambda ids: np.zeros(len(ids), np.uint64))
    events = [event(f"u{line % 3}", f"i{line % 2}", line) for line in range(12)]
    source = MemorySource(("a",), one_part(item("i0"), item("i1")), one_part(*events), [])
    _, shards = assemble(source, tmp_path, 1, 8)
    users = naive.read_shards(tmp_path, shards, ["a"])
    assert {user: found.histories for user, found in users.items()} == naive.ingest(events, {"i0", "i1"}).users
