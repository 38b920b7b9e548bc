"""Tables with a column of vectors per task: checked as strictly as the universal one; tables without are as before."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.publishing.conftest import FACTS, build_table, unit_rows
from userrep.manifest import FileEntry, IncompleteTableError, Manifest, describe_file, read_manifest
from userrep.publishing import table as table_module
from userrep.publishing.card import render_card
from userrep.publishing.client import pull
from userrep.publishing.registry import publish
from userrep.publishing.rows import EmbeddingTableError, checked_rows
from userrep.publishing.table import finish_table, lookup, read_table, write_part
from userrep.publishing.verify import content_sha256, schema_of, verify_table
from userrep.schema import task_column, user_embeddings

TASKS = ("gender", "T2-age_group")
COLUMNS = ("embedding", "embedding_gender", "embedding_T2-age_group")
NAME_CHARACTERS = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-")


def finish(directory: Path, parts: list[FileEntry], tasks: tuple[str, ...], /, **facts: object) -> Manifest:
    return finish_table(
        directory, parts=parts, dim=8, dtype="float32", tasks=tasks, facts={**FACTS, **facts}, config={}, inputs={}
    )


def plain_schema(dim: int, value_type: pa.DataType) -> pa.Schema:
    """The schema of a table without tasks, written out."""
    fields = [
        ("user_id", pa.string(), False, b"id, as in events"),
        ("embedding", pa.list_(value_type, dim), False, b"user vector, L2 norm 1"),
        ("num_events", pa.int32(), False, b"events that the vector was computed from"),
        ("last_time", pa.int64(), True, b"unix seconds of the latest event; null where unknown"),
    ]
    return pa.schema([pa.field(name, type_, null, {b"doc": doc}) for name, type_, null, doc in fields])


@pytest.mark.parametrize(("dtype", "value_type"), [("float32", pa.float32()), ("float16", pa.float16())])
def test_a_table_without_tasks_is_byte_for_byte_what_it_was(tmp_path, dtype, value_type):
    schema = plain_schema(8, value_type)
    assert user_embeddings(8, dtype).serialize() == schema.serialize()
    rows = build_table(tmp_path / "t", dtype=dtype)
    for number in range(3):
        name = f"part-{number:05d}.parquet"
        mine = pq.read_table(tmp_path / "t" / name).sort_by("user_id")
        again = pa.Table.from_arrays([mine[column].combine_chunks() for column in schema.names], schema=schema)
        compression = dict.fromkeys(schema.names, "zstd") | {"embedding.list.element": "none"}
        del compression["embedding"]
        pq.write_table(again, tmp_path / name, compression=compression, use_dictionary=False, row_group_size=16_384)
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / name).read_bytes()
    assert set(read_manifest(tmp_path / "t").facts) == {
        *(*FACTS, "created_at", "rows", "dim", "dtype", "metric", "table_sha256", "config_hash", "bucketing")
    }
    assert rows.schema.equals(schema, check_metadata=True)


def test_columns_of_tasks_come_last_in_the_order_given():
    schema = user_embeddings(8, "float16", TASKS)
    assert pa.schema(list(schema)[:4]).equals(plain_schema(8, pa.float16()), check_metadata=True)
    assert tuple(schema.names[4:]) == COLUMNS[1:]
    for task, field in zip(TASKS, list(schema)[4:], strict=True):
        assert (field.type, field.nullable) == (pa.list_(pa.float16(), 8), False)
        assert field.metadata == {
            b"doc": f"the user as task {task} sees it, from recent events of all services, L2 norm 1".encode()
        }
    assert user_embeddings(8, "float16", TASKS[::-1]).names[4:] == schema.names[:3:-1]


@settings(deadline=None)
@given(st.lists(st.text(st.sampled_from("aZ09_-. /\n\u00e9,"), max_size=3), max_size=4))
def test_names_are_taken_as_they_are_or_refused(names: list[str]):
    good = all(name and set(name) <= NAME_CHARACTERS for name in names)
    if good and len(names) == len(set(names)):
        assert user_embeddings(4, "float32", names).names[4:] == ["embedding_" + name for name in names]
    else:
        with pytest.raises(ValueError, match="task"):
            user_embeddings(4, "float32", names)


@pytest.mark.parametrize("name", ["age group", "", "gender\n", "a/b", "a.b", "\u00e4ge"])
def test_a_wrong_name_says_what_is_allowed(tmp_path, name):
    allowed = r"letters \(A-Z, a-z\), digits, _ and -"
    with pytest.raises(ValueError, match=f"task name {re.escape(repr(name))}: .*{allowed}"):
        task_column(name)
    rows = unit_rows(["a"])
    with pytest.raises(EmbeddingTableError, match=allowed):
        write_part(tmp_path, 0, rows.append_column(f"embedding_{name}", rows["embedding"]))
    entry = write_part(tmp_path, 0, rows)
    with pytest.raises(IncompleteTableError, match=allowed):
        finish(tmp_path, [entry], (name,))
    assert not (tmp_path / "manifest.json").exists()


def test_a_name_given_twice_or_a_bare_string_is_refused(tmp_path):
    for tasks in (["gender", "gender"], "age"):
        with pytest.raises(ValueError, match="give a list of names, each of them once"):
            user_embeddings(8, "float32", tasks)
    rows = unit_rows(["a"], tasks=["gender"])
    with pytest.raises(EmbeddingTableError, match="each of them once"):
        write_part(tmp_path, 0, rows.append_column("embedding_gender", rows["embedding"]))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_read(tmp_path, dtype):
    rows = build_table(tmp_path / "t", dtype=dtype, tasks=TASKS)
    manifest = verify_table(tmp_path / "t")
    assert manifest.facts["tasks"] == list(TASKS)
    assert schema_of(manifest).equals(rows.schema, check_metadata=True)
    dataset = read_table(tmp_path / "t")
    assert dataset.schema.equals(rows.schema, check_metadata=True)
    assert dataset.to_table().sort_by("user_id").equals(rows)
    assert len({str(rows[column].to_pylist()) for column in COLUMNS}) == 3  # the columns differ, so none is another's


def test_a_part_does_not_depend_on_row_order_or_chunks(tmp_path):
    rows = unit_rows([f"u{index}" for index in range(9)], tasks=TASKS)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    shuffled = pa.concat_tables([rows.slice(5), rows.slice(0, 5)])
    assert write_part(tmp_path / "a", 0, rows) == write_part(tmp_path / "b", 0, shuffled)
    assert pq.read_table(tmp_path / "b" / "part-00000.parquet").equals(rows)


def test_lookup_gives_every_column_in_the_order_asked_for(tmp_path):
    rows = build_table(tmp_path / "t", tasks=TASKS)
    found = lookup(read_table(tmp_path / "t"), ["user-7", "nobody", "user-3", "user-7"])
    of_user = {row["user_id"]: row for row in rows.to_pylist()}
    assert found.to_pylist() == [of_user["user-7"], of_user["user-3"], of_user["user-7"]]


def overwrite_columns(part: Path, kept: set[str]) -> None:
    """Fills the pages of all columns but some with bytes that cannot be decoded."""
    content = bytearray(part.read_bytes())
    metadata = pq.read_metadata(part)
    assert metadata.num_row_groups > 1
    for group in range(metadata.num_row_groups):
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(index)
            if chunk.path_in_schema.split(".")[0] not in kept:
                start, size = chunk.data_page_offset, chunk.total_compressed_size
                content[start : start + size] = b"\xff" * size
    part.write_bytes(content)


@pytest.mark.parametrize("column", COLUMNS)
def test_one_column_is_read_without_the_others(tmp_path, monkeypatch, column):
    monkeypatch.setattr(table_module, "ROW_GROUP_ROWS", 5)
    rows = build_table(tmp_path / "t", tasks=TASKS)
    wanted = ["user_id", column]
    for part in (tmp_path / "t").glob("*.parquet"):
        overwrite_columns(part, set(wanted))
    dataset = read_table(tmp_path / "t", verify=False)
    for fragment in dataset.get_fragments():
        assert fragment.scanner(schema=dataset.schema, columns=wanted).projected_schema.names == wanted
    assert dataset.to_table(columns=wanted).sort_by("user_id").equals(rows.select(wanted))
    with pytest.raises(OSError, match=r"."):  # each of the others is damaged
        dataset.to_table()
    with pytest.raises(IncompleteTableError, match=r"part-00000\.parquet has sha256"):
        verify_table(tmp_path / "t")


def with_values(rows: pa.Table, column: str, user: str, values: list[float | None] | None) -> pa.Table:
    """The rows with another vector for one user in one column."""
    vectors = rows[column].to_pylist()
    vectors[rows["user_id"].to_pylist().index(user)] = values
    index = rows.schema.get_field_index(column)
    field = rows.schema.field(column)
    return rows.set_column(index, field.with_nullable(True), pa.array(vectors, field.type))


BAD_VECTORS = [
    ([0.0] * 8, "user 'b' has a vector of norm 0 in column '{}'"),
    ([float("nan")] * 8, "user 'b' has a vector of norm nan in column '{}'"),
    ([float("-inf")] + [0.0] * 7, "user 'b' has a vector of norm inf in column '{}'"),
    ([0.998] + [0.0] * 7, "user 'b' has a vector of norm 0.998.* in column '{}'"),
    ([None] * 3 + [0.0] * 4 + [1.0], "column '{}' holds 3 nulls, the first of user 'b'"),
    (None, "column '{}' holds 1 nulls, the first of user 'b'"),
]


@pytest.mark.parametrize(
    ("values", "message"), BAD_VECTORS, ids=["zero", "nan", "inf", "not-unit", "null-values", "null-vector"]
)
@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_column_of_vectors_is_checked(tmp_path, dtype, column, values, message):
    rows = unit_rows(["c", "b", "a"], dtype=dtype, tasks=TASKS)
    with pytest.raises(EmbeddingTableError, match=message.format(column)):
        write_part(tmp_path, 0, with_values(rows, column, "b", values))
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None)
@given(
    broken=st.sets(st.tuples(st.sampled_from(COLUMNS), st.sampled_from("abcdef"))),
    order=st.permutations("abcdef"),
    norm=st.sampled_from([0.0, 0.99, 1.01, 5.0]),
)
def test_the_first_column_and_its_first_user_are_named(broken: set[tuple[str, str]], order: list[str], norm: float):
    rows = unit_rows(order, tasks=TASKS)
    for column, user in broken:
        rows = with_values(rows, column, user, [norm] + [0.0] * 7)
    if not broken:
        assert checked_rows(rows)["user_id"].to_pylist() == sorted(order)
        return
    column, user = min(broken, key=lambda pair: (COLUMNS.index(pair[0]), pair[1]))
    with pytest.raises(EmbeddingTableError, match=rf"user '{user}' has a vector of norm .* in column '{column}'"):
        checked_rows(rows)


def test_all_columns_have_one_width_and_type(tmp_path):
    rows = unit_rows(["a", "b"], tasks=["gender"])
    for other in (unit_rows(["a", "b"], dim=4), unit_rows(["a", "b"], dtype="float16")):
        with pytest.raises(EmbeddingTableError, match=r"'embedding_age' is fixed_size_list.*one width and type"):
            write_part(tmp_path, 0, rows.append_column("embedding_age", other["embedding"]))
    with pytest.raises(EmbeddingTableError, match="'embedding_age' is int64"):
        write_part(tmp_path, 0, rows.append_column("embedding_age", pa.array([1, 2])))
    with pytest.raises(EmbeddingTableError, match=r"allowed is .*last_time: int64, embedding_gender"):
        write_part(tmp_path, 0, rows.select(["user_id", "embedding", "embedding_gender", "num_events", "last_time"]))


def without_a_column(rows: pa.Table) -> pa.Table:
    return rows.drop_columns([COLUMNS[2]])


def with_one_more(rows: pa.Table) -> pa.Table:
    return rows.append_column("embedding_more", rows["embedding"])


def in_another_order(rows: pa.Table) -> pa.Table:
    return rows.select([*rows.schema.names[:4], COLUMNS[2], COLUMNS[1]])


CHANGES = [without_a_column, with_one_more, in_another_order]


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_with_other_columns_than_the_table_stops_the_commit(tmp_path, change: Callable[[pa.Table], pa.Table]):
    parts = [
        write_part(tmp_path, 0, unit_rows(["a"], tasks=TASKS)),
        write_part(tmp_path, 1, change(unit_rows(["b"], tasks=TASKS))),
    ]
    with pytest.raises(
        IncompleteTableError, match=r"part-00001.*has the columns .*promises .*embedding_gender: .*T2-age"
    ):
        finish(tmp_path, parts, TASKS)
    assert not (tmp_path / "manifest.json").exists()


def test_tasks_must_be_named_if_and_only_if_the_parts_have_them(tmp_path):
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    parts = [write_part(tmp_path / "with", 0, unit_rows(["a"], tasks=TASKS))]
    with pytest.raises(IncompleteTableError, match="has the columns"):
        finish(tmp_path / "with", parts, ())
    parts = [write_part(tmp_path / "without", 0, unit_rows(["a"]))]
    with pytest.raises(IncompleteTableError, match=r"promises .*embedding_gender"):
        finish(tmp_path / "without", parts, ("gender",))


def edit_facts(directory: Path, **facts: object) -> None:
    values = json.loads((directory / "manifest.json").read_text())
    values["facts"] |= facts
    (directory / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "has the columns"),
        (["gender"], "has the columns"),
        (list(TASKS[::-1]), "has the columns"),
        ([*TASKS, "more"], "promises .*embedding_more"),
        (["gender", "age group"], "task name 'age group'"),
        (["gender", "gender"], "each of them once"),
        ("gender", "each of them once"),
        (None, "tasks None"),
        ([1, 2], "tasks \\[1, 2\\]"),
    ],
)
def test_a_manifest_that_states_other_tasks_is_refused(tmp_path, tasks, message):
    build_table(tmp_path / "t", tasks=TASKS)
    edit_facts(tmp_path / "t", tasks=tasks)
    with pytest.raises(IncompleteTableError, match=message):
        verify_table(tmp_path / "t")


def test_a_manifest_that_forgets_the_tasks_or_invents_one_is_refused(tmp_path):
    build_table(tmp_path / "with", tasks=TASKS)
    values = json.loads((tmp_path / "with" / "manifest.json").read_text())
    del values["facts"]["tasks"]
    (tmp_path / "with" / "manifest.json").write_text(json.dumps(values))
    build_table(tmp_path / "without")
    edit_facts(tmp_path / "without", tasks=["gender"])
    for directory in (tmp_path / "with", tmp_path / "without"):
        with pytest.raises(IncompleteTableError, match="has the columns"):
            verify_table(directory)


def test_a_flipped_bit_in_a_column_of_a_task_is_found(tmp_path):
    build_table(tmp_path / "t", tasks=TASKS)
    part = tmp_path / "t" / "part-00001.parquet"
    chunk = pq.read_metadata(part).row_group(0).column(4)
    assert chunk.path_in_schema.startswith("embedding_gender")
    content = bytearray(part.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(IncompleteTableError, match=r"part-00001\.parquet has sha256"):
        verify_table(tmp_path / "t")


@pytest.mark.parametrize("change", CHANGES)
def test_a_part_that_was_replaced_with_its_checksums_is_found_by_its_columns(
    tmp_path, change: Callable[[pa.Table], pa.Table]
):
    build_table(tmp_path / "t", tasks=TASKS)
    part = tmp_path / "t" / "part-00001.parquet"
    pq.write_table(change(pq.read_table(part)), part)
    manifest = read_manifest(tmp_path / "t")
    files = [
        describe_file(tmp_path / "t", part, entry.rows) if entry.path == part.name else entry
        for entry in manifest.files
    ]
    facts = {**manifest.facts, "table_sha256": content_sha256([entry for entry in files if entry.rows is not None])}
    forged = manifest.model_copy(update={"files": tuple(files), "facts": facts})
    (tmp_path / "t" / "manifest.json").write_text(forged.model_dump_json())
    with pytest.raises(
        IncompleteTableError, match=r"part-00001\.parquet has the columns .*promises .*embedding_gender"
    ):
        verify_table(tmp_path / "t")


def test_facts_are_of_the_tasks_of_the_table(tmp_path):
    entry = write_part(tmp_path, 0, unit_rows(["a"], tasks=["gender"]))
    for key in ("task_scores", "task_kinds"):
        with pytest.raises(EmbeddingTableError, match=f"{key}.* names 'age'; the tasks of this table are gender"):
            finish(tmp_path, [entry], ("gender",), **{key: {"age": {}}})
    with pytest.raises(EmbeddingTableError, match="must not hold tasks"):
        finish(tmp_path, [entry], ("gender",), **{"tasks": ["gender"]})


def test_the_card_lists_the_columns_and_how_to_read_one(tmp_path):
    build_table(
        tmp_path / "t",
        tasks=TASKS,
        name="shoppers",
        task_kinds={"gender": "label"},
        task_scores={"gender": {"accuracy": 0.8125}},
    )
    card = (tmp_path / "t" / "card.md").read_text()
    assert "One vector per user and column" in card
    assert "| `embedding_gender` | label | accuracy 0.8125 |\n| `embedding_T2-age_group` | - | - |" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "recipe", "exec")
    assert 'table.dataset().to_table(columns=["user_id", "embedding_gender"])' in code
    assert card.isascii()


def test_a_card_without_tasks_does_not_speak_of_columns(table_dir):
    card = (table_dir / "card.md").read_text()
    assert "column" not in card
    assert card == render_card(read_manifest(table_dir).facts)


def test_a_published_table_says_its_tasks_and_is_pulled_with_its_columns(
    tmp_path, table_dir, name, sqlite_uri, fresh_client
):
    rows = build_table(tmp_path / "wide", tasks=TASKS)
    for directory in (table_dir, tmp_path / "wide"):
        publish(directory, name, "champion", tracking_uri=sqlite_uri, experiment="tables")
    assert fresh_client.get_model_version(name, "2").tags["tasks"] == "gender,T2-age_group"
    assert "tasks" not in fresh_client.get_model_version(name, "1").tags
    pulled = pull(f"{name}@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    assert pulled.dataset().to_table().sort_by("user_id").equals(rows)
