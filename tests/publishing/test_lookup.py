"""Rows of some ids: those that were asked for, from no file that cannot hold them."""

import json

import pyarrow as pa
import pytest

from tests.publishing.conftest import build_table, unit_rows
from userrep.manifest import IncompleteTableError
from userrep.publishing import lookup, table
from userrep.publishing.lookup import lookup_ids
from userrep.publishing.table import bucket_of, finish_table, read_table, write_part


@pytest.fixture
def opened_parts(monkeypatch) -> list[str]:
    """Names of the parts that were opened."""
    names, open_part = [], lookup.pq.ParquetFile

    def recorded(path, **options):
        names.append(path.name)
        return open_part(path, **options)

    monkeypatch.setattr(lookup.pq, "ParquetFile", recorded)
    return names


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_rows_are_those_of_the_table_in_the_order_asked_for(tmp_path, dtype):
    rows = build_table(tmp_path / "t", tasks=("buys",))
    ids = ["user-7", "nobody", "user-31", "user-7", "user-0"]
    found = lookup_ids(tmp_path / "t", ids)
    expected = table.lookup(read_table(tmp_path / "t"), ids)
    assert found.equals(expected)
    assert found["user_id"].to_pylist() == ["user-7", "user-31", "user-7", "user-0"]
    assert lookup_ids(tmp_path / "t", rows["user_id"].to_pylist()).equals(rows.combine_chunks())


def test_only_the_parts_of_the_ids_buckets_are_opened(table_dir, opened_parts):
    found = lookup_ids(table_dir, ["user-3"])
    assert found["user_id"].to_pylist() == ["user-3"]
    assert opened_parts == [f"part-{bucket_of('user-3', 3):05d}.parquet"]


def test_parts_without_a_known_rule_are_chosen_by_their_ranges(tmp_path, opened_parts):
    rows = unit_rows([f"user-{number:02d}" for number in range(30)])
    parts = [write_part(tmp_path, number, rows.slice(number * 10, 10)) for number in range(3)]
    facts = {"encoder_digest": "e", "tokenizer_digest": "t", "data_digest": "d", "code_version": "c"}
    finish_table(tmp_path, parts=parts, dim=8, dtype="float32", facts=facts, config={}, inputs={})
    opened_parts.clear()
    assert lookup_ids(tmp_path, ["user-11", "user-12x"])["user_id"].to_pylist() == ["user-11"]
    assert opened_parts == ["part-00001.parquet"]


def test_row_groups_that_cannot_hold_an_id_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "ROW_GROUP_ROWS", 4)
    build_table(tmp_path / "t", num_users=60)
    read, read_row_group = [], lookup.pq.ParquetFile.read_row_group

    def recorded(part, number, **options):
        read.append((number, tuple(options["columns"])))
        return read_row_group(part, number, **options)

    monkeypatch.setattr(lookup.pq.ParquetFile, "read_row_group", recorded)
    assert lookup_ids(tmp_path / "t", ["user-33"], ["num_events"])["user_id"].to_pylist() == ["user-33"]
    assert [columns for _, columns in read] == [("user_id",), ("user_id", "num_events")]
    assert len({number for number, _ in read}) == 1


def test_a_rule_of_other_parts_is_not_believed(table_dir):
    path = table_dir / "manifest.json"
    values = json.loads(path.read_text())
    values["facts"]["bucketing"]["count"] = 2
    path.write_text(json.dumps(values))
    ids = [f"user-{number}" for number in range(40)]
    assert lookup_ids(table_dir, ids)["user_id"].to_pylist() == ids


def test_no_ids_and_unknown_columns(table_dir):
    assert lookup_ids(table_dir, [], ["embedding"]).schema.names == ["user_id", "embedding"]
    with pytest.raises(ValueError, match="received column 'nothing'; the table has user_id, embedding"):
        lookup_ids(table_dir, ["user-1"], ["nothing"])


def test_a_part_that_is_gone_or_damaged_is_named(table_dir):
    part = table_dir / f"part-{bucket_of('user-3', 3):05d}.parquet"
    part.write_bytes(part.read_bytes()[:-10])
    with pytest.raises(IncompleteTableError, match=rf"{part.name} cannot be read"):
        lookup_ids(table_dir, ["user-3"])
    part.unlink()
    with pytest.raises(IncompleteTableError, match=rf"{part.name} cannot be read"):
        lookup_ids(table_dir, ["user-3"])


def test_factors_of_int8_come_with_their_vectors(tmp_path):
    rows = unit_rows(["a", "b"])
    entry = write_part(tmp_path, 0, rows, dtype="int8")
    facts = {"encoder_digest": "e", "tokenizer_digest": "t", "data_digest": "d", "code_version": "c"}
    finish_table(tmp_path, parts=[entry], dim=8, dtype="int8", facts=facts, config={}, inputs={})
    found = lookup_ids(tmp_path, ["b"], ["embedding"])
    assert found.schema.names == ["user_id", "embedding", "scale"]
    assert found.schema.field("embedding").type.value_type == pa.int8()
