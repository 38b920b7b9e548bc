import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.memory_source import event, item, read_batches
from tests.support.naive import places, read_quarantine
from userrep.data.parse import ITEMS, QUARANTINE, parse_part, read_spill
from userrep.data.sources.source import Parsed, TableName
from userrep.data.split import assign_buckets, id_keys
from userrep.schema import EVENTS, REJECTED

BUCKETS = 3


def bad(line: int, table: str = "events", record: str = "?") -> dict[str, Any]:
    return {"table": table, "file": "events", "line": line, "id": None, "reason": "bad_time", "record": record}


def batches(start: int, count: int = 4) -> list[list[dict[str, Any]]]:
    """Batches of ten records with ids of several scripts, one of them rejected."""
    names = ["u", "U", "사용자", "\u00e9", "e\u0301", "\U0001f600", "u\0"]
    return [
        [
            event(names[line % 7], f"i{line}", line) if line % 10 else bad(line, record='열"\n\u2028')
            for line in range(first, first + 10)
        ]
        for first in range(start, start + 10 * count, 10)
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def spilled(directory: Path, table: TableName = "events") -> list[list[dict[str, Any]]]:
    return [read_spill(directory, table, bucket).to_pylist() for bucket in range(BUCKETS)]


def parse(index: int, records: list[list[dict[str, Any]]], directory: Path) -> tuple[int, int]:
    return parse_part("events", index, partial(read_batches, "events", records), directory, BUCKETS)


def test_each_event_is_in_its_users_bucket_once_in_source_order(tmp_path: Path):
    parts = [batches(1), batches(41, 1), batches(51, 3)]
    for index in (2, 0, 1):  # whichever task comes first
        assert parse(index, parts[index], tmp_path) == (10 * len(parts[index]), len(parts[index]))
    everything = [record for part in parts for batch in part for record in batch]
    good = [record for record in everything if "reason" not in record]
    expected: list[list[dict[str, Any]]] = [[], [], []]
    for record in good:
        expected[assign_buckets(id_keys(pa.array([record["user_id"]])), BUCKETS)[0]].append(record)
    assert spilled(tmp_path) == expected
    assert all(expected), "every bucket is meant to be used here"
    quarantined = read_quarantine(tmp_path / QUARANTINE)
    assert quarantined == [record for record in everything if "reason" in record]


@pytest.mark.parametrize("crash_after", range(4))
def test_a_part_that_crashed_and_ran_again_leaves_nothing_of_the_first_attempt(tmp_path: Path, crash_after: int):
    crashed, straight = tmp_path / "crashed", tmp_path / "straight"
    for directory in (crashed, straight):
        parse(0, batches(1, 1), directory)
    with pytest.raises(OSError, match="disk on fire"):
        parse_part("events", 1, partial(read_batches, "events", batches(11), crash_after=crash_after), crashed, BUCKETS)
    for directory in (crashed, straight):
        parse(1, batches(11), directory)
    assert contents(crashed) == contents(straight)


def test_what_an_earlier_attempt_wrote_elsewhere_is_removed(tmp_path: Path):
    # A source that changed between two attempts: the old events lie in other buckets, and nothing is rejected now.
    parse(0, batches(1), tmp_path)
    assert read_quarantine(tmp_path / QUARANTINE)
    only = [event("u", "i", 1)]
    assert parse(0, [only], tmp_path) == (1, 0)
    assert [record for bucket in spilled(tmp_path) for record in bucket] == only
    assert read_quarantine(tmp_path / QUARANTINE) == []


def test_items_are_written_per_part_and_a_second_attempt_replaces_the_first(tmp_path: Path):
    records = [[item("a"), item("A")], [item("a", text="two"), bad(9, "items")], []]
    part = partial(read_batches, "items", records)
    with pytest.raises(OSError, match="disk on fire"):
        parse_part("items", 4, partial(read_batches, "items", records, crash_after=1), tmp_path, BUCKETS)
    assert parse_part("items", 4, part, tmp_path, BUCKETS) == (4, 1)
    (path,) = (tmp_path / ITEMS).iterdir()
    assert pq.read_table(path).to_pylist() == [*records[0], records[1][0]]
    assert places(read_quarantine(tmp_path / QUARANTINE)) == [("items", "events", 9, "bad_time")]


def test_labels_are_spilled_with_their_users(tmp_path: Path):
    users = [
        {"user_id": f"u{n}", "labels": [("age", str(n)), ("로", "\U0001f600")], "file": "f", "line": n}
        for n in range(9)
    ]
    parse_part("users", 0, partial(read_batches, "users", [users]), tmp_path, BUCKETS)
    found = [record for bucket in spilled(tmp_path, "users") for record in bucket]
    assert sorted(found, key=lambda record: record["line"]) == users


@pytest.mark.parametrize("table", ["items", "events", "users"])
def test_a_part_without_records_is_fine(tmp_path: Path, table: TableName):
    assert parse_part(table, 0, lambda: iter(()), tmp_path, BUCKETS) == (0, 0)
    assert parse_part(table, 1, partial(read_batches, table, [[], []]), tmp_path, BUCKETS) == (0, 0)
    assert spilled(tmp_path) == [[], [], []]
    assert not (tmp_path / QUARANTINE).exists()


def test_a_quarantined_record_is_one_line_of_json(tmp_path: Path):
    parse(0, [[bad(1, record='{"a": "\u2028\u0085\n\r\t열\U0001f600"}')]], tmp_path)
    (path,) = (tmp_path / QUARANTINE).iterdir()
    (line,) = path.read_bytes().rstrip(b"\n").split(b"\n")
    assert json.loads(line) == bad(1, record='{"a": "\u2028\u0085\n\r\t열\U0001f600"}')


def test_memory_holds_one_batch_of_a_part(tmp_path: Path):
    # 60 batches of about 1 MB: Arrow's pool, which holds every table here, must not grow with their number.
    def part() -> Iterator[Parsed]:
        for number in range(60):
            rows = [event("u" * 100_000, "i", number * 10 + row) for row in range(10)]
            yield Parsed(pa.Table.from_pylist(rows, schema=EVENTS), REJECTED.empty_table())

    pool = pa.default_memory_pool()
    before, peaks = pool.bytes_allocated(), []

    def watched() -> Iterator[Parsed]:
        for parsed in part():
            peaks.append(pool.bytes_allocated() - before)
            yield parsed

    assert parse_part("events", 0, watched, tmp_path, 1) == (600, 0)
    assert max(peaks) < 20e6
    assert max(peaks[30:]) <= 1.5 * max(peaks[:30])
