"""Tables of items: written, published and pulled as those of users are, and never taken for one."""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.publishing.conftest import FACTS, NUM_BUCKETS, left_in, unit_rows, unit_vectors
from userrep.manifest import IncompleteTableError, read_manifest
from userrep.publishing.card import render_card
from userrep.publishing.client import list_tables, pull, resolve
from userrep.publishing.connection import RegistryError, UnknownTableError
from userrep.publishing.entity import ITEM, USER
from userrep.publishing.registry import publish
from userrep.publishing.rows import EmbeddingTableError
from userrep.publishing.table import bucket_of, finish_table, lookup, read_table, write_part
from userrep.publishing.verify import embedding_kind, verify_table
from userrep.schema import item_embeddings


def item_rows(item_ids: list[str], dim: int = 8, dtype: str = "float32", seed: int = 0) -> pa.Table:
    schema = item_embeddings(dim, dtype)
    vectors = unit_vectors(random.Random(seed), len(item_ids), schema.field("embedding").type)
    return pa.Table.from_arrays([pa.array(item_ids, pa.string()), vectors], schema=schema)


def finish(directory: Path, parts: list, **changes):
    arguments = {"dim": 8, "dtype": "float32", "facts": FACTS, "config": {}, "inputs": {}, "entity": ITEM}
    return finish_table(directory, parts=parts, **{**arguments, **changes})


def build_items(directory: Path, num_items: int = 30, dtype: str = "float32", **facts: object) -> pa.Table:
    """Writes a committed table of items and returns its rows as one Arrow table sorted by item id."""
    directory.mkdir(parents=True)
    rows = item_rows([f"item-{index}" for index in range(num_items)], dtype=dtype)
    buckets = [bucket_of(item_id, NUM_BUCKETS) for item_id in rows["item_id"].to_pylist()]
    parts = [
        write_part(directory, bucket, rows.filter(pa.array([mine == bucket for mine in buckets])), ITEM)
        for bucket in range(NUM_BUCKETS)
    ]
    finish(directory, parts, dtype=dtype, facts={**FACTS, **facts})
    return rows.sort_by("item_id")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_what_is_written_is_published_and_pulled(tmp_path, name, sqlite_uri, fresh_client, dtype):
    rows = build_items(tmp_path / "items", dtype=dtype)
    assert verify_table(tmp_path / "items").table == "item_embeddings"
    done = publish(tmp_path / "items", name, "champion", tracking_uri=sqlite_uri, experiment="tables")
    pulled = pull(f"{name}@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    assert (pulled.entity, pulled.version.version) == (ITEM, 1)
    assert pulled.manifest.facts["table_sha256"] == done.table_sha256
    assert pulled.dataset().schema.equals(rows.schema, check_metadata=True)
    assert pulled.dataset().to_table().sort_by("item_id").equals(rows)
    assert left_in(tmp_path / "copy") == left_in(tmp_path / "items")
    for path in (tmp_path / "items").iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()
    version = fresh_client.get_model_version(name, "1")
    assert version.description == f"30 items x 8 {dtype}; see card.md among the files"
    assert fresh_client.get_registered_model(name).tags["userrep.table"] == "item_embeddings"
    again = publish(tmp_path / "items", name, "second", tracking_uri=sqlite_uri, experiment="tables")
    assert (again.version, again.model_id) == (1, done.model_id)


def test_lookup_takes_the_ids_of_what_the_table_holds(tmp_path, table_dir):
    rows = build_items(tmp_path / "items")
    found = lookup(read_table(tmp_path / "items"), ["item-7", "nothing", "user-3", "item-3", "item-7"])
    of_item = {row["item_id"]: row for row in rows.to_pylist()}
    assert found.to_pylist() == [of_item["item-7"], of_item["item-3"], of_item["item-7"]]
    assert lookup(read_table(table_dir), ["item-7", "user-3"])["user_id"].to_pylist() == ["user-3"]


@pytest.mark.parametrize("is_item", [True, False])
def test_the_command_pulls_both_and_says_which(published, tmp_path, sqlite_uri, is_item):
    if is_item:
        build_items(tmp_path / "items")
        published = f"{published}_items"
        publish(tmp_path / "items", published, "champion", tracking_uri=sqlite_uri, experiment="tables")
    arguments = ["pull", f"{published}@champion", "--to", str(tmp_path / "copy"), "--tracking-uri", sqlite_uri]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    told = json.loads(done.stdout)
    assert (told["rows_are"], told["rows"]) == (("items", 30) if is_item else ("users", 40))
    assert told["directory"] == str(tmp_path / "copy")


def with_vector(values: Sequence[float | None]) -> pa.Table:
    rows = item_rows(["good", "odd"])
    field = rows.schema.field("embedding")
    return rows.set_column(1, field, pa.array([rows["embedding"][0].as_py(), values], field.type))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (with_vector([1.001] + [0.0] * 7), "item 'odd' has a vector of norm 1.001 .*leave out items without"),
        (with_vector([0.0] * 8), "item 'odd' has a vector of norm 0 "),
        (with_vector([float("nan")] * 8), "item 'odd' has a vector of norm nan"),
        (with_vector([None] * 7 + [1.0]), "column 'embedding' holds 7 nulls, the first of item 'odd'"),
        (item_rows(["twin", "other", "twin"]), "item 'twin' has more than one row"),
        (item_rows(["a"]).set_column(0, "item_id", pa.array([None], pa.string())), "'item_id' holds 1 nulls"),
        (unit_rows(["a"]), "received columns user_id.*allowed is userrep.schema.item_embeddings.*: item_id: string"),
        (item_rows(["a"]).append_column("num_events", pa.array([1], pa.int32())), "received .*num_events.* allowed"),
        (item_rows(["a"]).drop_columns(["embedding"]), "received columns item_id: string; allowed"),
        (unit_rows(["a"], tasks=["age"]), "tasks .'age'.: an item has one vector"),
    ],
    ids=["not-unit", "zero", "nan", "null-value", "twin", "null-id", "users", "column-more", "no-vector", "task"],
)
def test_rows_that_must_not_be_published_are_refused(tmp_path, rows, message):
    with pytest.raises(EmbeddingTableError, match=message):
        write_part(tmp_path, 0, rows, ITEM)
    assert list(tmp_path.iterdir()) == []


def test_items_are_no_users(tmp_path):
    with pytest.raises(EmbeddingTableError, match=r"received columns item_id.*: user_id: string"):
        write_part(tmp_path, 0, item_rows(["a"]))
    parts = [write_part(tmp_path, 0, item_rows(["a"]), ITEM)]
    with pytest.raises(IncompleteTableError, match=r"has the columns item_id.*promises user_id"):
        finish(tmp_path, parts, entity=USER)
    with pytest.raises(IncompleteTableError, match="an item has one vector and no column per task"):
        finish(tmp_path, parts, tasks=("age",))
    assert left_in(tmp_path) == ["part-00000.parquet"]


def test_an_item_in_two_parts_is_refused(tmp_path):
    parts = [write_part(tmp_path, bucket, item_rows(["same", f"own-{bucket}"]), ITEM) for bucket in range(2)]
    with pytest.raises(EmbeddingTableError, match="1 rows too many: item 'same' is in more than one part"):
        finish(tmp_path, parts)
    assert not (tmp_path / "manifest.json").exists()


def test_a_manifest_that_calls_items_users_is_refused(tmp_path):
    build_items(tmp_path / "items")
    path = tmp_path / "items" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "table": "user_embeddings"}))
    with pytest.raises(IncompleteTableError, match=r"has the columns item_id.*promises user_id"):
        verify_table(tmp_path / "items")


def test_the_card_says_what_a_table_of_items_is(tmp_path):
    build_items(tmp_path / "items", name="shop_items", coverage={"items without content": 3}, limits=["Since | May"])
    card = (tmp_path / "items" / "card.md").read_text()
    assert card == render_card(read_manifest(tmp_path / "items").facts, ITEM)
    assert card.startswith("# Item embeddings: shop_items\n\nOne vector per item, computed from the item's attributes")
    assert "| what | items |\n|---|---|\n| items in the table | 30 |\n| items without content | 3 |" in card
    assert "- Since \\| May" in card
    assert 'lookup(table.dataset(), ["some-item-id"])' in card
    assert "user" not in card.replace("userrep", "")
    assert "personal data" not in card
    assert "last_time" not in card
    assert card.isascii()


def test_a_name_holds_tables_of_users_or_of_items(published, table_dir, tmp_path, sqlite_uri):
    build_items(tmp_path / "items")
    items = f"{published}_items"
    with pytest.raises(RegistryError, match="holds no embedding tables of items; choose another name"):
        publish(tmp_path / "items", published, "champion", tracking_uri=sqlite_uri, experiment="tables")
    publish(tmp_path / "items", items, "champion", tracking_uri=sqlite_uri, experiment="tables")
    with pytest.raises(RegistryError, match="holds no embedding tables of users; choose another name"):
        publish(table_dir, items, "champion", tracking_uri=sqlite_uri, experiment="tables")
    with pytest.raises(IncompleteTableError, match="of kind 'item_embeddings', wanted 'user_embeddings'"):
        publish(
            tmp_path / "items",
            published,
            "champion",
            tracking_uri=sqlite_uri,
            experiment="tables",
            kind=embedding_kind(table_dir),
        )
    listed = [summary.name for summary in list_tables(tracking_uri=sqlite_uri)]
    assert listed == sorted(listed)
    assert {published, items} <= set(listed)
    with pytest.raises(UnknownTableError, match=f"did you mean .*{items}"):
        resolve(f"{items}s@champion", tracking_uri=sqlite_uri)


def test_a_copy_of_users_gives_way_to_the_items(published, tmp_path, sqlite_uri):
    rows = build_items(tmp_path / "items")
    publish(tmp_path / "items", f"{published}_items", "champion", tracking_uri=sqlite_uri, experiment="tables")
    assert pull(f"{published}@champion", tmp_path / "copy", tracking_uri=sqlite_uri).entity == USER
    pulled = pull(f"{published}_items@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    assert pulled.dataset().to_table().sort_by("item_id").equals(rows)
    part = tmp_path / "copy" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    pulled = pull(f"{published}_items@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    assert pulled.dataset().to_table().sort_by("item_id").equals(rows)
