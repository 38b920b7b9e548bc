from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read, read_tables
from tests.support.shared_data import shared_data
from userrep.config import ConfigError
from userrep.data.sources import parquet_file
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.source import TableName
from userrep.data.sources.validate import MAX_BATCH_ROWS

NAN, INF = float("nan"), float("inf")


def write(path: Path, columns: dict[str, Any], **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)


def events(**changes: list[Any] | pa.Array) -> dict[str, Any]:
    columns = {
        "user_id": ["u1", "u2", "u3"],
        "item_id": ["i1", "i2", "i3"],
        "service": ["a", "b", "a"],
        "value": [1.0, 2.0, 3.0],
        "timestamp": [10, 20, 30],
        "pos": [0, 1, 2],
    }
    return {name: column for name, column in (columns | changes).items() if column is not None}


# A change of the three good events, and what is wrong with rows 1, 2, 3 afterwards.
PLANTED: list[tuple[dict[str, Any], list[str | None]]] = [
    ({}, [None, None, None]),
    ({"user_id": ["", None, " "]}, ["missing_id"] * 3),
    ({"item_id": [None, "i2", "\t"]}, ["missing_id", None, "missing_id"]),
    ({"value": [INF, -INF, 1e300]}, ["non_finite_value"] * 3),
    ({"value": [NAN, None, 0.0]}, [None, None, None]),
    ({"value": ["1.5", "x", ""]}, [None, "bad_value", None]),
    ({"timestamp": [None, None, 5]}, [None, None, None]),
    ({"timestamp": [None, 5, -5], "pos": [None, None, 1]}, ["bad_time", None, "bad_time"]),
    ({"timestamp": ["10", "x", ""], "pos": None}, [None, "bad_time", "bad_time"]),
    ({"pos": [0.0, 0.5, NAN]}, [None, "bad_position", None]),
    ({"service": ["a", None, "c"]}, [None, "unknown_service", "unknown_service"]),
    ({"user_id": ["", "u", "u"], "value": [INF, INF, 1.0]}, ["missing_id", "non_finite_value", None]),
    ({"user_id": pa.array([b"u", b"\xff", b"\xc3\xa9"], pa.binary())}, [None, "bad_encoding", None]),
    ({"user_id": pa.array([b"u", b"\xff", b"v"], pa.binary()).view(pa.string())}, [None, "bad_encoding", None]),
    ({"user_id": [1, None, 2**62]}, [None, "missing_id", None]),
]


@pytest.mark.parametrize(("changes", "reasons"), PLANTED)
def test_each_planted_fault_is_found_and_no_good_record_lost(
    tmp_path: Path, changes: dict[str, Any], reasons: list[str | None]
):
    write(tmp_path / "events.parquet", events(**changes))
    good, faults = read(ParquetSource(path=tmp_path, service_names=("a", "b")), "events")
    assert faults == [("events.parquet", row, reason) for row, reason in enumerate(reasons, start=1) if reason]
    assert [row["line"] for row in good] == [row for row, reason in enumerate(reasons, start=1) if not reason]


def test_rejected_rows_hold_the_record(tmp_path: Path):
    user_ids = pa.array([b"u", b"\xff", b"v"], pa.binary()).view(pa.string())
    write(tmp_path / "events.parquet", events(user_id=user_ids, value=[INF, 0.0, 1.0], service=None, pos=None))
    _, rejected = read_tables(ParquetSource(path=tmp_path), "events")
    assert rejected["record"].to_pylist() == [
        '{"user_id": "u", "item_id": "i1", "value": Infinity, "timestamp": 10}',
        '{"user_id": "\\\\xff", "item_id": "i2", "value": 0.0, "timestamp": 20}',
    ]


def test_values_are_read_exactly(tmp_path: Path):
    write(tmp_path / "events.parquet", events(user_id=[2**62 + 1, 7, -1], value=[0.1, NAN, 3.0]))
    rows, _ = read_tables(ParquetSource(path=tmp_path), "events")
    assert rows["user_id"].to_pylist() == [str(2**62 + 1), "7", "-1"]
    assert rows["value"].to_pylist() == [pytest.approx(0.1, rel=1e-7), None, 3.0]
    assert rows["time"].to_pylist() == [10, 20, 30]
    assert rows["position"].to_pylist() == [0, 1, 2]


def test_columns_may_have_other_names_and_services_may_be_absent(tmp_path: Path):
    moment = [datetime(2019, 1, 1, tzinfo=UTC)] * 2
    write(tmp_path / "log.parquet", {"u": ["u1", "u2"], "i": [5, 6], "t": moment})
    source = ParquetSource(
        path=tmp_path, events="log.parquet", user_id="u", item_id="i", time="t", default_service="buy"
    )
    assert source.services() == ["buy"]
    good, faults = read(source, "events")
    assert [(row["user_id"], row["item_id"], row["service"], row["time"]) for row in good] == [
        ("u1", "5", "buy", 1546300800),
        ("u2", "6", "buy", 1546300800),
    ]
    assert not faults


def test_services_are_found_or_given(tmp_path: Path):
    write(tmp_path / "events.parquet", events(service=pa.array(["b", "", "a"]).dictionary_encode()))
    assert ParquetSource(path=tmp_path).services() == ["a", "b"]
    good, faults = read(ParquetSource(path=tmp_path, service_names=("b",)), "events")
    assert [row["item_id"] for row in good] == ["i1"]
    assert [line for _, line, _ in faults] == [2, 3]


def test_items_default_text_is_every_text_column(tmp_path: Path):
    items = {
        "item_id": ["i1", "i2", None, "i4"],
        "service": ["a"] * 4,
        "title": ["Dryer", None, "lost", " "],
        "price": [1.5, 2.5, 3.5, 4.5],
        "categories": [["Hair", "Care"], ["Pans"], [], None],
    }
    write(tmp_path / "items.parquet", items)
    good, faults = read(ParquetSource(path=tmp_path), "items")
    assert [(row["item_id"], row["text"]) for row in good] == [("i1", "Dryer Hair Care"), ("i2", "Pans")]
    assert faults == [("items.parquet", 3, "missing_id"), ("items.parquet", 4, "empty_text")]
    good, _ = read(ParquetSource(path=tmp_path, text_columns=("price", "title|categories")), "items")
    assert [row["text"] for row in good] == ["1.5 Dryer", "2.5 Pans", "4.5"]
    keeping = ParquetSource(path=tmp_path, text_columns=("price", "title|categories"), keep_attributes=True)
    assert [row["text"] for row in read(keeping, "items")[0]] == [
        "price\t1.5\ntitle\tDryer",
        "price\t2.5\ntitle\tPans",
        "price\t4.5",
    ]


def test_items_with_undecodable_text(tmp_path: Path):
    titles = pa.array([b"good", b"\xff", b"also"], pa.binary()).view(pa.string())
    tags = pa.ListArray.from_arrays([0, 1, 2, 3], pa.array([b"x", b"y", b"\xff"], pa.binary()).view(pa.string()))
    write(tmp_path / "items.parquet", {"item_id": ["1", "2", "3"], "title": titles, "tags": tags})
    good, faults = read(ParquetSource(path=tmp_path), "items")
    assert [row["text"] for row in good] == ["good x"]
    assert faults == [("items.parquet", 2, "bad_encoding"), ("items.parquet", 3, "bad_encoding")]


def test_users_labels_are_strings_without_nulls(tmp_path: Path):
    users = {"user_id": ["u1", "u2", ""], "age": [30, None, 1], "score": [0.5, NAN, 1.0], "city": ["", "Seoul", "x"]}
    write(tmp_path / "users.parquet", users)
    good, faults = read(ParquetSource(path=tmp_path), "users")
    assert [(row["user_id"], dict(row["labels"])) for row in good] == [
        ("u1", {"age": "30", "score": "0.5"}),
        ("u2", {"city": "Seoul"}),
    ]
    assert faults == [("users.parquet", 3, "missing_id")]
    good, _ = read(ParquetSource(path=tmp_path, label_columns=("city",)), "users")
    assert [dict(row["labels"]) for row in good] == [{}, {"city": "Seoul"}]
    good, _ = read(ParquetSource(path=tmp_path, label_columns=()), "users")
    assert [dict(row["labels"]) for row in good] == [{}, {}]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=25, deadline=None
)
@given(row_group_size=st.integers(1, 50), slice_rows=st.integers(1, 60), num_files=st.integers(1, 3))
def test_division_into_row_groups_parts_and_files_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row_group_size: int, slice_rows: int, num_files: int
):
    values = [INF if number % 7 == 0 else float(number) for number in range(40)]
    table = {"user_id": [f"u{n}" for n in range(40)], "item_id": ["i"] * 40, "value": values, "pos": list(range(40))}
    folder = tmp_path / f"{row_group_size}-{slice_rows}-{num_files}"
    for part in range(num_files):
        columns = {name: column[part::num_files] for name, column in table.items()}
        write(folder / f"events/part-{part}.parquet", columns, row_group_size=row_group_size)
    monkeypatch.setattr(parquet_file, "SLICE_ROWS", slice_rows)
    good, faults = read(ParquetSource(path=folder, events="events"), "events")
    found = [(row["file"], row["line"], int(row["user_id"][1:])) for row in good]
    whole = [(f"events/part-{n % num_files}.parquet", n // num_files + 1, n) for n in range(40)]
    assert sorted(found) == sorted(entry for entry in whole if entry[2] % 7)
    assert sorted((file, line) for file, line, _ in faults) == sorted(entry[:2] for entry in whole if entry[2] % 7 == 0)


def test_one_huge_row_group_comes_in_bounded_batches(tmp_path: Path):
    rows = 2 * MAX_BATCH_ROWS + 10
    columns = {"user_id": pa.repeat("u", rows), "item_id": pa.repeat("i", rows), "pos": pa.array(range(rows))}
    write(tmp_path / "events.parquet", columns, row_group_size=rows)
    source = ParquetSource(path=tmp_path)
    (part,) = source.parts("events")
    assert max(parsed.rows.num_rows for parsed in part()) <= MAX_BATCH_ROWS
    table, _ = read_tables(source, "events")  # asserts the size of each batch
    assert table["line"].to_pylist() == list(range(1, rows + 1))
    assert table["position"].to_pylist() == list(range(rows))


def test_what_cannot_be_read_at_all_is_a_config_error(tmp_path: Path):
    source = ParquetSource(path=tmp_path)
    assert source.parts("users") == []
    with pytest.raises(ConfigError, match=r"no Parquet file .*events\.parquet"):
        source.parts("events")
    with pytest.raises(ConfigError, match=r"no Parquet file .*people\.parquet"):
        ParquetSource(path=tmp_path, users="people.parquet").parts("users")
    (tmp_path / "events.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="is not a readable Parquet file"):
        source.parts("events")
    write(tmp_path / "events.parquet", events(item_id=None))
    with pytest.raises(ConfigError, match="has no column 'item_id': it has"):
        source.parts("events")
    write(tmp_path / "events.parquet", events(timestamp=None, pos=None))
    with pytest.raises(ConfigError, match="neither 'timestamp' nor 'pos'"):
        source.parts("events")
    write(tmp_path / "events.parquet", events(user_id=[1.0, 2.0, 3.0]))
    with pytest.raises(ConfigError, match=r"'user_id' of .* is of type double, not id"):
        source.parts("events")
    write(tmp_path / "items.parquet", {"item_id": ["1"], "price": [1.0]})
    with pytest.raises(ConfigError, match="has no text column"):
        source.parts("items")
    with pytest.raises(ConfigError, match=r"has no \['title'\]"):
        ParquetSource(path=tmp_path, text_columns=("title|price",)).parts("items")
    write(tmp_path / "users.parquet", {"user_id": ["1"], "tags": [["a"]]})
    with pytest.raises(ConfigError, match=r"has nested \['tags'\]"):
        source.parts("users")


# Counts as in each set's README
@pytest.mark.parametrize(
    ("name", "services", "num_items", "num_events", "num_users"),
    [
        ("yelp2019", ["food", "local"], 20_033, 316_354, 0),
        ("amazon2014_beauty_sports_toys", ["beauty", "sports", "toys"], 42_381, 662_436, 0),
        ("ml1m_users1_2999", ["rating"], 3_883, 487_650, 6_040),
        ("amazon2018_industrial_and_scientific", ["review"], 3_686, 22_743, 0),
        ("amazon2018_office_products", ["review"], 3_459, 22_447, 0),
    ],
)
def test_real_sets_are_read_whole(name: str, services: list[str], num_items: int, num_events: int, num_users: int):
    source = ParquetSource(path=shared_data(name))
    assert source.services() == services
    counts: dict[TableName, int] = {"items": num_items, "events": num_events, "users": num_users}
    for table, expected in counts.items():
        rows, rejected = read_tables(source, table)
        assert (rows.num_rows, rejected.num_rows) == (expected, 0)


def test_real_texts():
    source = ParquetSource(
        path=shared_data("amazon2014_beauty_sports_toys"), text_columns=("title|keywords", "categories", "brand")
    )
    rows, _ = read_tables(source, "items")
    assert rows["text"][0].as_py() == (
        "WAWO 15 Color Professionl Makeup Eyeshadow Camouflage Facial Concealer Neutral Palette "
        "Beauty Makeup Face Concealers & Neutralizers"
    )
