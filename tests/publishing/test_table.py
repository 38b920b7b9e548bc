"""Writing and reading tables: what goes in comes out; what must not be published is refused with its reason."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tests.publishing.conftest import FACTS, build_table, unit_rows
from userrep.manifest import IncompleteTableError, read_manifest
from userrep.publishing.card import render_card
from userrep.publishing.rows import EmbeddingTableError
from userrep.publishing.table import bucket_of, finish_table, lookup, read_table, write_part
from userrep.publishing.verify import verify_table


def finish(directory: Path, parts: list, **changes):
    arguments = {"parts": parts, "dim": 8, "dtype": "float32", "facts": FACTS, "config": {}, "inputs": {}}
    return finish_table(directory, **{**arguments, **changes})


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    rows = build_table(tmp_path / "t", dtype=dtype)
    dataset = read_table(tmp_path / "t")
    assert dataset.to_table().sort_by("user_id").equals(rows)
    assert dataset.schema.equals(rows.schema, check_metadata=True)


def test_a_part_does_not_depend_on_row_order_or_chunks(tmp_path):
    rows = unit_rows([f"u{index}" for index in range(9)])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shuffled = pa.concat_tables([rows.slice(5), rows.slice(0, 5)])
    assert write_part(tmp_path / "a", 0, rows) == write_part(tmp_path / "b", 0, shuffled)


def test_lookup_keeps_the_order_asked_for_and_skips_unknown_users(table_dir):
    found = lookup(read_table(table_dir), ["user-7", "nobody", "user-3", "user-7"])
    assert found["user_id"].to_pylist() == ["user-7", "user-3", "user-7"]
    assert lookup(read_table(table_dir), []).num_rows == 0


def test_buckets_are_the_same_everywhere():
    # CRC-32 check value of the standard ("123456789" -> 0xCBF43926), so another implementation finds the same bucket.
    assert bucket_of("123456789", 1000) == 0xCBF43926 % 1000


def test_an_empty_bucket_is_a_part(tmp_path):
    entry = write_part(tmp_path, 4, unit_rows([]))
    finish(tmp_path, [entry])
    assert (entry.path, entry.rows) == ("part-00004.parquet", 0)
    assert read_table(tmp_path).count_rows() == 0


def with_vector(values: list[float]) -> pa.Table:
    rows = unit_rows(["good", "odd"])
    vectors = [rows["embedding"][0].as_py(), values]
    return rows.set_column(1, rows.schema.field(1), pa.array(vectors, rows.schema.field(1).type))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_vector([0.0] * 8), "'odd' has a vector of norm 0"),
        (with_vector([float("nan")] * 8), "'odd' has a vector of norm nan"),
        (with_vector([float("inf")] + [0.0] * 7), "'odd' has a vector of norm inf"),
        (with_vector([1.001] + [0.0] * 7), "norm 1.001"),
        (unit_rows(["twin", "other", "twin"]), "'twin' has more than one row"),
        (unit_rows(["a"]).drop_columns(["num_events"]), "received columns user_id"),
        (pa.table({"user_id": ["a"]}), "received columns user_id"),
        (unit_rows(["a"]).set_column(0, "user_id", pa.array([None], pa.string())), "'user_id' holds 1 nulls"),
    ],
    ids=["zero", "nan", "inf", "not-unit", "twin", "column-missing", "no-vector", "null-id"],
)
def test_rows_that_must_not_be_published_are_refused(tmp_path, rows, message):
    with pytest.raises(EmbeddingTableError, match=message):
        write_part(tmp_path, 0, rows)
    assert list(tmp_path.iterdir()) == []


def test_a_null_inside_a_vector_is_refused(tmp_path):
    rows = unit_rows(["a"])
    broken = rows.set_column(1, "embedding", pa.array([[None] * 7 + [1.0]], rows.schema.field(1).type))
    with pytest.raises(EmbeddingTableError, match="'embedding' holds 7 nulls"):
        write_part(tmp_path, 0, broken)


def test_a_user_in_two_parts_is_refused(tmp_path):
    parts = [write_part(tmp_path, bucket, unit_rows(["same", f"own-{bucket}"])) for bucket in range(2)]
    with pytest.raises(EmbeddingTableError, match="1 rows too many: user 'same'"):
        finish(tmp_path, parts)
    assert not (tmp_path / "manifest.json").exists()


def test_facts_must_say_where_the_table_comes_from(tmp_path):
    parts = [write_part(tmp_path, 0, unit_rows(["a"]))]
    with pytest.raises(EmbeddingTableError, match="lack encoder_digest"):
        finish(tmp_path, parts, facts={**FACTS, "encoder_digest": ""})
    with pytest.raises(EmbeddingTableError, match="must not hold rows"):
        finish(tmp_path, parts, facts={**FACTS, "rows": 7})


def test_a_file_that_nobody_listed_stops_the_commit(tmp_path):
    parts = [write_part(tmp_path, bucket, unit_rows([f"u{bucket}"])) for bucket in range(2)]
    with pytest.raises(IncompleteTableError, match="part-00001"):
        finish(tmp_path, parts[:1])


def test_width_and_type_must_be_those_of_the_parts(tmp_path):
    parts = [write_part(tmp_path, 0, unit_rows(["a"]))]
    with pytest.raises(IncompleteTableError, match=r"fixed_size_list.*\[8\].*promises.*\[16\]"):
        finish(tmp_path, parts, dim=16)


@pytest.mark.parametrize("fact", ["rows", "table_sha256"])
def test_a_manifest_that_contradicts_its_parts_is_refused(table_dir, fact):
    path = table_dir / "manifest.json"
    values = json.loads(path.read_text())
    values["facts"][fact] = 7
    path.write_text(json.dumps(values))
    with pytest.raises(IncompleteTableError, match=f"states .*{'7 rows' if fact == 'rows' else 'table_sha256 7'}"):
        read_table(table_dir, verify=False)


def test_verify_names_a_file_that_does_not_belong(table_dir):
    (table_dir / "notes.txt").write_text("mine")
    with pytest.raises(IncompleteTableError, match=r"notes\.txt"):
        verify_table(table_dir)


def test_the_card_tells_origin_quality_coverage_and_recipe(table_dir, tmp_path):
    build_table(
        tmp_path / "rich",
        name="shoppers",
        quality={"recall_at_10": {"this table": 0.3125, "popularity": 0.125}},
        coverage={"users without events": 12},
        limits=["Trained on | one month"],
    )
    card = (tmp_path / "rich" / "card.md").read_text()
    facts = read_manifest(tmp_path / "rich").facts
    for expected in (facts["table_sha256"], facts["config_hash"], "e" * 12, "t" * 12, "d" * 12):
        assert expected in card
    assert "| recall_at_10 | 0.3125 | 0.1250 |" in card
    assert "| users without events | 12 |" in card
    assert "Trained on \\| one month" in card
    assert "userrep pull shoppers@ALIAS --to shoppers" in card
    compile(card.partition("```python\n")[2].partition("```")[0], "recipe", "exec")
    assert "Not measured" in (table_dir / "card.md").read_text()
    assert card.isascii()


def test_a_card_needs_its_facts():
    with pytest.raises(KeyError, match="rows"):
        render_card({})
