"""Vectors beside events."""

import pyarrow as pa
import pytest

from tests.publishing.conftest import FACTS, build_table, unit_rows
from userrep.publishing.id_space import IdSpaceMismatchError
from userrep.publishing.join import join
from userrep.publishing.table import finish_table, write_part

USERS = ["user-5", None, "user-1", "nobody", "user-5"]
EVENTS = pa.table({"user_id": pa.array(USERS, pa.string()), "value": [1, 2, 3, 4, 5]})


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_left_join_keeps_every_event_in_its_place(tmp_path, dtype):
    rows = unit_rows([f"user-{number}" for number in range(9)], dtype="float16" if dtype == "float16" else "float32")
    entry = write_part(tmp_path, 0, rows, dtype=dtype)
    finish_table(tmp_path, parts=[entry], dim=8, dtype=dtype, facts=FACTS, config={}, inputs={})
    joined = join(EVENTS, tmp_path)
    assert joined.select(["user_id", "value"]).equals(EVENTS)
    assert joined.schema.field("embedding").type.value_type == pa.float32()
    vectors = joined["embedding"].to_pylist()
    assert [vector is None for vector in vectors] == [False, True, False, True, False]
    for place, row in ((0, 5), (2, 1), (4, 5)):
        assert vectors[place] == pytest.approx(rows["embedding"][row].as_py(), abs=0.01)


def test_an_inner_join_drops_events_without_a_row(table_dir):
    joined = join(EVENTS, table_dir, how="inner", columns=["num_events", "embedding"])
    assert joined["value"].to_pylist() == [1, 3, 5]
    assert joined.schema.names == ["user_id", "value", "num_events", "embedding"]
    assert joined["embedding"].null_count == 0


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()])
def test_ids_of_any_kind_of_string_are_found(table_dir, kind):
    events = pa.table({"who": pa.array(USERS, pa.string()).cast(kind)})
    assert join(events, table_dir, on="who")["embedding"].null_count == 2


def test_no_events(table_dir):
    assert join(EVENTS.slice(0, 0), table_dir).schema.names == ["user_id", "value", "embedding"]


def test_another_id_space_is_refused(tmp_path):
    build_table(tmp_path / "t", id_space="shop")
    assert join(EVENTS, tmp_path / "t", id_space="shop").num_rows == join(EVENTS, tmp_path / "t").num_rows == 5
    with pytest.raises(IdSpaceMismatchError, match="of id space 'shop', those of the events of 'bank'"):
        join(EVENTS, tmp_path / "t", id_space="bank")
    with pytest.raises(IdSpaceMismatchError, match="'shop', those of the events of 'bank'"):
        join(EVENTS.replace_schema_metadata({"id_space": "bank"}), tmp_path / "t")


def test_items_are_no_users(table_dir):
    with pytest.raises(IdSpaceMismatchError, match="the table is of users, column 'item_id' holds ids of items"):
        join(pa.table({"item_id": ["a"]}), table_dir, on="item_id")


@pytest.mark.parametrize(
    ("events", "options", "message"),
    [
        (pa.table({"user": ["a"]}), {}, "not 'user_id': say on="),
        (pa.table({"user_id": [1]}), {}, "is int64; ids are strings"),
        (EVENTS.append_column("embedding", EVENTS["value"]), {}, "a column 'embedding' already"),
        (EVENTS, {"columns": ["nothing"]}, "received column 'nothing'"),
        (EVENTS, {"how": "outer"}, "allowed are 'left' and 'inner'"),
    ],
    ids=["no-ids", "integers", "taken", "unknown", "how"],
)
def test_what_cannot_be_joined_is_explained(table_dir, events, options, message):
    with pytest.raises(ValueError, match=message):
        join(events, table_dir, **options)
