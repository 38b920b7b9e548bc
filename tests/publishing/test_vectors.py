"""Vectors of every dtype read back as float32; what int8 costs is measured, and said."""

import json

import pyarrow as pa
import pytest

from tests.publishing.conftest import FACTS, build_table, unit_rows
from userrep.manifest import IncompleteTableError, read_manifest
from userrep.publishing.rows import EmbeddingTableError
from userrep.publishing.table import finish_table, read_table, write_part
from userrep.publishing.vectors import float32_vectors, joined_errors, quantised


def dots(left: pa.Array, right: pa.Array) -> list[float]:
    return [
        sum(x * y for x, y in zip(a, b, strict=True)) for a, b in zip(left.to_pylist(), right.to_pylist(), strict=True)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("column", ["embedding", "embedding_buys"])
def test_one_function_reads_all_types(tmp_path, dtype, column):
    rows = unit_rows([f"u{index:02d}" for index in range(50)], dim=24, tasks=("buys",))
    stored = rows if dtype != "float16" else unit_rows(rows["user_id"].to_pylist(), 24, "float16", 0, ("buys",))
    entry = write_part(tmp_path, 0, stored, dtype=dtype)
    finish_table(tmp_path, parts=[entry], dim=24, dtype=dtype, tasks=("buys",), facts=FACTS, config={}, inputs={})
    read = float32_vectors(read_table(tmp_path).to_table(), column)
    assert read.type == pa.list_(pa.float32(), 24)
    assert dots(read, read) == pytest.approx([1.0] * 50, abs=1e-3)
    assert min(dots(read, float32_vectors(rows, column))) > 0.9998


def test_the_error_of_int8_is_what_it_is(tmp_path):
    rows = unit_rows([f"u{index:02d}" for index in range(50)], dim=24)
    entry = write_part(tmp_path, 0, rows, dtype="int8")
    manifest = finish_table(tmp_path, parts=[entry], dim=24, dtype="int8", facts=FACTS, config={}, inputs={})
    original, read = float32_vectors(rows), float32_vectors(read_table(tmp_path).to_table())
    errors = [
        abs(x - y)
        for a, b in zip(original.to_pylist(), read.to_pylist(), strict=True)
        for x, y in zip(a, b, strict=True)
    ]
    cosines, stated = dots(original, read), manifest.facts["quantisation"]
    assert stated["vectors"] == 50
    assert stated["max_abs_error"] == pytest.approx(max(errors), rel=1e-3)
    assert stated["mean_cosine"] == pytest.approx(sum(cosines) / 50, abs=1e-6)
    assert stated["min_cosine"] == pytest.approx(min(cosines), abs=1e-6)
    card = (tmp_path / "card.md").read_text()
    assert f"{stated['mean_cosine']:.6f}" in card
    assert f"{stated['max_abs_error']:.2g}" in card


def test_rows_that_are_int8_already_are_written_as_they_are(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = write_part(tmp_path / "a", 0, unit_rows(["a", "b"], dim=24), dtype="int8")
    rows = pa.parquet.read_table(tmp_path / "a" / first.path)
    again = write_part(tmp_path / "b", 0, rows, dtype="int8")
    assert (again.sha256, again.quantisation) == (first.sha256, None)


def test_extreme_vectors_survive_int8():
    axis, flat = [1.0] + [0.0] * 15, [0.25] * 16
    vectors = pa.array([axis, flat, [-x for x in axis]], pa.list_(pa.float32(), 16))
    integers, scales, error = quantised(vectors)
    assert [max(map(abs, row)) for row in integers.to_pylist()] == [127] * 3
    read = float32_vectors(pa.table({"embedding": integers, "scale": scales}))
    assert read.flatten().to_pylist() == pytest.approx([x for row in vectors.to_pylist() for x in row], abs=1e-6)
    assert error is not None
    assert error.min_cosine == pytest.approx(1)
    assert joined_errors([]) is None


def test_a_factor_that_makes_no_unit_vector_is_refused(tmp_path):
    entry = write_part(tmp_path, 0, unit_rows(["a", "b"], dim=24), dtype="int8")
    rows = pa.parquet.read_table(tmp_path / entry.path)
    place = rows.schema.get_field_index("scale")
    broken = rows.set_column(place, rows.schema.field(place), pa.array([1.0, 1.0], pa.float32()))
    with pytest.raises(EmbeddingTableError, match=r"user 'a' has a vector of norm \d+"):
        write_part(tmp_path, 1, broken)
    with pytest.raises(ValueError, match="wanted 'scale' among them"):
        float32_vectors(rows.drop_columns(["scale"]))


def test_a_part_is_not_rounded_to_float16_silently(tmp_path):
    with pytest.raises(EmbeddingTableError, match="rows hold float32, wanted float16"):
        write_part(tmp_path, 0, unit_rows(["a"]), dtype="float16")


def test_the_manifest_knows_range_bucketing_and_kind_of_ids(tmp_path):
    build_table(tmp_path / "t", id_space="shop")
    manifest = read_manifest(tmp_path / "t")
    assert manifest.facts["bucketing"] == {"rule": "crc32 of the utf-8 id modulo count", "count": 3}
    for entry in manifest.files[:3]:
        ids = pa.parquet.read_table(tmp_path / "t" / entry.path)["user_id"].to_pylist()
        assert (entry.min_id, entry.max_id) == (min(ids), max(ids))
    build_table(tmp_path / "other", id_space="cinema")
    assert read_manifest(tmp_path / "other").facts["id_space_digest"] != manifest.facts["id_space_digest"]


def test_a_range_of_ids_that_is_not_the_parts_is_refused(tmp_path):
    build_table(tmp_path / "t")
    path = tmp_path / "t" / "manifest.json"
    values = json.loads(path.read_text())
    values["files"][1]["max_id"] = "user-999"
    path.write_text(json.dumps(values))
    with pytest.raises(IncompleteTableError, match=r"has ids from .*its manifest says from .*user-999"):
        read_table(tmp_path / "t")


def test_ids_dealt_in_another_way_get_no_rule_unless_one_is_given(tmp_path):
    parts = [write_part(tmp_path, bucket, unit_rows([f"u{bucket}-{n}" for n in range(9)])) for bucket in range(2)]
    arguments = {"parts": parts, "dim": 8, "dtype": "float32", "config": {}, "inputs": {}}
    assert "bucketing" not in finish_table(tmp_path, facts=FACTS, **arguments).facts
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(EmbeddingTableError, match="the table has 2 parts"):
        finish_table(tmp_path, facts={**FACTS, "bucketing": {"rule": "mine", "count": 3}}, **arguments)
    given = {"rule": "mine", "count": 2}
    assert finish_table(tmp_path, facts={**FACTS, "bucketing": given}, **arguments).facts["bucketing"] == given
