"""The scan finds an id wherever it is written, and no number that only looks like one."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from userrep.erasure.scan import scan

IDS = pa.array(["alice-17", "42"])


def found(path: Path) -> bool:
    return bool(scan([path], IDS).found)


def test_columns_of_any_depth(tmp_path: Path) -> None:
    columns = {
        "flat": pa.array(["x", "42"]),
        "list": pa.array([["a"], ["b", "42"]]),
        "map": pa.array([[("k", "v")], [("k", "42")]], type=pa.map_(pa.string(), pa.string())),
        "struct": pa.array([{"who": "z"}, {"who": "42"}]),
        "none": pa.array(["420", "x42"]),
        "number": pa.array([42, 42]),
    }
    for name, column in columns.items():
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({name: column}), path)
        assert found(path) == (name not in ("none", "number")), name


def test_values_of_json_and_bytes_of_small_files(tmp_path: Path) -> None:
    for name, content, is_found in (
        ("a.json", json.dumps({"files": [{"min_id": "42"}]}), True),
        ("b.json", json.dumps({"rows": 42, "text": "user 42 is not searched in a text"}), False),
        ("c.jsonl", '{"a": 1}\n{"42": null}\n', True),
        ("d.md", "of alice-17.", True),
        ("e.md", "of alice-171 and malice-17", False),
        ("f.bin", "\x00\x03alice-17\x00", True),
        ("g.html", "<b>42</b>", False),
    ):
        (tmp_path / name).write_text(content)
        assert found(tmp_path / name) == is_found, name


def test_what_was_searched_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    (tmp_path / "b.md").write_text("alice-17")
    result = scan([tmp_path / "a.md", tmp_path / "b.md"], IDS)
    assert (result.num_files, result.num_raw, result.found) == (2, 2, (tmp_path / "b.md",))
    assert scan([tmp_path / "b.md"], pa.array(["42"])).num_raw == 0
