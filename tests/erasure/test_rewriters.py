"""Files without some users: the others' rows are as they were, in their order."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from userrep.erasure.rewriters import erase_lines, erase_rows, names_of

IDS = pa.array(["u7", "u8"])


def test_rows_go_row_group_by_row_group(tmp_path: Path) -> None:
    table = pa.table({"user_id": [f"u{n}" for n in range(12)], "value": range(12)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    assert erase_rows(tmp_path / "a.parquet", tmp_path / "b.parquet", IDS) == 2
    assert pq.read_table(tmp_path / "b.parquet")["value"].to_pylist() == [0, 1, 2, 3, 4, 5, 6, 9, 10, 11]
    assert erase_rows(tmp_path / "b.parquet", tmp_path / "c.parquet", IDS) == 0
    pq.write_table(table.rename_columns(["item_id", "value"]), tmp_path / "d.parquet")
    assert erase_rows(tmp_path / "d.parquet", tmp_path / "c.parquet", IDS) == 0
    assert not (tmp_path / "c.parquet").exists()


@pytest.mark.parametrize(
    ("text", "is_named"),
    [
        ("user_id=u7 item_id=i1", True),
        ('{"user": "u8", "item": "x"}', True),
        ("u7,i3,4", True),
        ("u77,i3", False),
        ("xu7", False),
        ("u7-b,i3", False),
        ("u", False),
    ],
)
def test_a_text_names_a_user_as_a_word(tmp_path: Path, text: str, is_named: bool) -> None:
    assert (names_of(IDS).search(text) is not None) == is_named
    lines = [{"record": "u1", "line": 1}, {"record": text, "line": 2}, {"record": "", "id": None, "line": 3}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert erase_lines(tmp_path / "a.jsonl", tmp_path / "b.jsonl", IDS) == is_named
    if is_named:
        left = [json.loads(line)["line"] for line in (tmp_path / "b.jsonl").read_text().splitlines()]
        assert left == [1, 3]
