import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read, read_tables, write
from userrep.config import ConfigError
from userrep.data.sources import lines
from userrep.data.sources.delimited import DelimitedSource

SERVICES = ("shop", "search")
EVENTS = {
    "user_id": "who",
    "item_id": "what",
    "service": "where",
    "time": "when",
    "position": "nth",
    "value": "stars",
}
GOOD = ("u1", "i1", "shop", "1546300800", "0", "4.5")
# One field of a good event exchanged, and what that must lead to (None: it is good as well).
CHANGES: list[tuple[str, str, str | None]] = [
    ("who", "", "missing_id"),
    ("what", " ", "missing_id"),
    ("where", "food", "unknown_service"),
    ("where", "", "unknown_service"),
    ("when", "yesterday", "bad_time"),
    ("when", "-5", "bad_time"),
    ("when", "1546300800000", "bad_time"),
    ("nth", "second", "bad_position"),
    ("nth", "1.5", "bad_position"),
    ("stars", "five", "bad_value"),
    ("stars", "inf", "non_finite_value"),
    ("stars", "-1e39", "non_finite_value"),
    ("stars", "", None),
    ("stars", "NaN", None),
    ("when", "", None),
    ("nth", "", None),
    ("who", "\xfc\u20ac, ::", None),
]
BROKEN = [("csv", b"u1,i1,shop"), ("csv", b'u1,"i1,shop,1,2,3'), ("csv", b"u1,i1,shop,1,2,3,4")]
BROKEN += [("jsonl", b'{"who": "u1"'), ("jsonl", b"[1, 2]"), ("jsonl", b"NaN"), ("jsonl", b"[" * 100_000)]


def source(folder: Path, **changes: Any) -> DelimitedSource:
    return DelimitedSource.parse({"path": folder, "events": EVENTS, "service_names": SERVICES, **changes})


def as_line(kind: str, fields: tuple[str, ...]) -> bytes:
    if kind == "jsonl":
        return json.dumps(dict(zip(EVENTS.values(), fields, strict=True)), ensure_ascii=False).encode()
    return ",".join('"' + field + '"' if "," in field else field for field in fields).encode()


def event(position: int, change: tuple[str, str] | None = None) -> tuple[str, ...]:
    fields = dict(zip(EVENTS.values(), (*GOOD[:4], str(position), GOOD[5]), strict=True))
    return tuple((fields | dict([change] if change else [])).values())


@pytest.mark.parametrize("end", ["csv", "jsonl", "csv.gz", "jsonl.gz"])
def test_each_planted_fault_is_found_and_no_good_record_lost(tmp_path: Path, end: str):
    kind = end.split(".")[0]
    header = [",".join(EVENTS.values()).encode()] if kind == "csv" else []
    rows, expected, expected_good = list(header), [], []
    plants: list[tuple[bytes, str | None]] = []
    plants += [
        (as_line(kind, event(100 + n, (name, value))), reason) for n, (name, value, reason) in enumerate(CHANGES)
    ]
    plants += [(line, "broken_line") for of, line in BROKEN if of == kind]
    plants += [(as_line(kind, event(0)).replace(b"i1", b"i\xff"), "bad_encoding"), (b"", "blank")]
    for number, (line, reason) in enumerate(plants):
        rows += [as_line(kind, event(number)), line]
        expected_good.append(len(rows) - 1)
        if reason is None:
            expected_good.append(len(rows))
        elif reason != "blank":
            expected.append((f"events.{end}", len(rows), reason))
    write(tmp_path / f"events.{end}", b"\n".join(rows) + b"\n")
    good, faults = read(source(tmp_path), "events")
    assert faults == expected
    assert [row["line"] for row in good] == expected_good
    assert {row["user_id"] for row in good} == {"u1", "\xfc\u20ac, ::"}


def test_rejected_rows_hold_the_record(tmp_path: Path):
    write(tmp_path / "events.csv", b"who,what,where,when,nth,stars\nu1,,shop,5,1,\n\xe9,i1,shop,5,1,\n" + b"x" * 2000)
    _, rejected = read_tables(source(tmp_path), "events")
    assert rejected["record"].to_pylist() == ["u1,,shop,5,1,", "\\xe9,i1,shop,5,1,", "x" * 500]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_values_are_read_exactly(tmp_path: Path, kind: str):
    header = b"who,what,where,when,nth,stars\n" if kind == "csv" else b""
    write(tmp_path / f"events.{kind}", header + as_line(kind, event(7)))
    good, _ = read(source(tmp_path), "events")
    assert good == [
        {
            "user_id": "u1",
            "item_id": "i1",
            "service": "shop",
            "time": 1546300800,
            "position": 7,
            "value": 4.5,
            "file": f"events.{kind}",
            "line": 2 if kind == "csv" else 1,
        }
    ]


def test_json_values_keep_their_types(tmp_path: Path):
    records = [
        {"who": 17, "what": 9007199254740993, "where": "shop", "when": 5, "nth": 2**62 + 1, "stars": 2},
        {"who": "u", "what": "i", "where": "shop", "when": 6.75, "nth": None, "stars": None},
        {"who": "u", "what": "i", "where": "shop", "when": "7", "nth": 1, "stars": "3.5"},
        {"who": 1.0, "what": "i", "where": "shop", "when": 1},
        {"who": True, "what": "i", "where": "shop", "when": 1},
        {"who": ["u"], "what": "i", "where": "shop", "when": 1},
        {"who": "u", "what": "i", "where": "shop", "when": True},
        {"who": "u", "what": "i", "where": "shop", "when": 1, "stars": {"of": 5}},
        {"who": "u", "what": "i", "where": "shop", "when": 10**30},
        {"who": "\ud800", "what": "i", "where": "shop", "when": 1},
        {"who": "u", "what": "i", "where": "shop", "when": "\ud800"},
        {"who": "u", "what": "i", "where": "shop"},
    ]
    write(tmp_path / "events.jsonl", "\n".join(map(json.dumps, records)))
    good, faults = read(source(tmp_path), "events")
    assert [(row["user_id"], row["item_id"], row["time"], row["position"], row["value"]) for row in good] == [
        ("17", "9007199254740993", 5, 2**62 + 1, 2.0),
        ("u", "i", 6, None, None),
        ("u", "i", 7, 1, 3.5),
    ]
    reasons = ["missing_id"] * 3 + ["bad_time", "bad_value", "bad_time", "bad_encoding", "bad_time", "bad_time"]
    assert faults == [("events.jsonl", line, reason) for line, reason in enumerate(reasons, start=4)]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=40, deadline=None
)
@given(
    picks=st.lists(st.sampled_from([None, *CHANGES])),
    span_bytes=st.integers(1, 400),
    kind=st.sampled_from(["csv", "jsonl"]),
)
def test_division_into_parts_changes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    picks: list[tuple[str, str, str | None] | None],
    span_bytes: int,
    kind: str,
):
    header = [b"who,what,where,when,nth,stars"] if kind == "csv" else []
    rows = header + [as_line(kind, event(number, pick and pick[:2])) for number, pick in enumerate(picks)]
    write(tmp_path / f"{kind}/events.{kind}", b"\n".join(rows))
    whole = read_tables(source(tmp_path / kind), "events")
    with monkeypatch.context() as patch:
        patch.setattr(lines, "SPAN_BYTES", span_bytes)
        divided = read_tables(source(tmp_path / kind), "events")
    assert divided[0].equals(whole[0])
    assert divided[1].equals(whole[1])
    assert whole[0].num_rows + whole[1].num_rows == len(picks)


def test_quotes(tmp_path: Path):
    write(
        tmp_path / "items.csv",
        'item_id,title,notes\r\n1,"Dryer, ""fast""",x\r\n2,12" pan,y\r\n"3",plain,z\r\n4,"open,w\r\n5,"a"b,c\r\n',
    )
    good, faults = read(source(tmp_path), "items")
    assert [(row["item_id"], row["text"], row["line"]) for row in good] == [
        ("1", 'Dryer, "fast" x', 2),
        ("2", '12" pan y', 3),
        ("3", "plain z", 4),
    ]
    assert faults == [("items.csv", 5, "broken_line"), ("items.csv", 6, "broken_line")]


def test_items_by_columns_and_without_text(tmp_path: Path):
    records = [
        {"id": 1, "title": "", "keywords": "quick dryer", "tags": ["hair", "care"], "price": 3},
        {"id": 2, "title": "Pan", "keywords": "unused"},
        {"id": 3, "title": " ", "price": 5},
        {"title": "no id"},
    ]
    write(tmp_path / "goods/a.json", "\n".join(map(json.dumps, records[:2])))
    write(tmp_path / "goods/b.ndjson.gz", "\n".join(map(json.dumps, records[2:])))
    items = {"files": "goods/*", "item_id": "id", "text": ["title|keywords", "tags"]}
    good, faults = read(source(tmp_path, items=items), "items")
    assert [(row["item_id"], row["text"], row["file"], row["line"]) for row in good] == [
        ("1", "quick dryer hair care", "goods/a.json", 1),
        ("2", "Pan", "goods/a.json", 2),
    ]
    assert faults == [("goods/b.ndjson.gz", 1, "empty_text"), ("goods/b.ndjson.gz", 2, "missing_id")]
    good, _ = read(source(tmp_path, items={"files": "goods/*", "item_id": "id"}), "items")
    assert [row["text"] for row in good] == ["quick dryer hair care 3", "Pan unused", "5"]


def test_users_and_tabs(tmp_path: Path):
    write(tmp_path / "users.tsv", "user_id\tage\tcity\nu1\t30s\tSeoul\nu2\t\tBusan\n\t40s\tUlsan\n")
    good, faults = read(source(tmp_path, users={}), "users")
    labels = [dict(row["labels"]) for row in good]
    assert labels == [{"age": "30s", "city": "Seoul"}, {"city": "Busan"}]
    assert faults == [("users.tsv", 4, "missing_id")]
    assert [dict(row["labels"]) for row in read(source(tmp_path, users={"labels": ["age"]}), "users")[0]] == [
        {"age": "30s"},
        {},
    ]
    assert source(tmp_path).parts("users") == []


def test_iso_times_and_one_service(tmp_path: Path):
    write(tmp_path / "events.csv", "user_id;item_id;timestamp\nu;i;2019-01-01T00:00:02Z\nu;i;2019-13-01\n")
    found = DelimitedSource.parse({"path": tmp_path, "delimiter": ";", "events": {"time_unit": "iso"}})
    good, faults = read(found, "events")
    assert [(row["time"], row["service"]) for row in good] == [(1546300802, "event")]
    assert faults == [("events.csv", 3, "bad_time")]
    assert found.services() == ["event"]


def test_what_cannot_be_read_at_all_is_a_config_error(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no file 'events\.\*' in .*set `events\.files`"):
        source(tmp_path).parts("events")
    write(tmp_path / "events.csv", "who,what\n")
    with pytest.raises(ConfigError, match=r"lacks \['where', 'when', 'nth', 'stars'\]"):
        source(tmp_path).parts("events")
    write(tmp_path / "events.csv", "who,what,where,when,nth,stars,who\n")
    with pytest.raises(ConfigError, match="names a column twice"):
        source(tmp_path).parts("events")
    (tmp_path / "events.csv").rename(tmp_path / "events.xlsx")
    with pytest.raises(ConfigError, match=r"ends in '\.xlsx': known endings"):
        source(tmp_path).parts("events")
    with pytest.raises(ConfigError, match=r"2 service_names but no events\.service"):
        DelimitedSource.parse({"path": tmp_path, "service_names": SERVICES})
