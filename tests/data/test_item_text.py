import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userrep.data.item_text import (
    column_texts,
    default_text_columns,
    format_attributes,
    item_text,
    parse_attributes,
    plain_text,
    record_attributes,
    record_text,
)

# A busy machine is no failure.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.recursive(
    st.none() | st.text(max_size=12) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=6,
)


def test_values_join_in_order_and_whitespace_collapses():
    fields = (
        "  Hair \t Dryer\n2000W ",
        None,
        ["Beauty", "", None, ["Hair", " Care "]],
        float("nan"),
        "",
        12,
        {"a": "b"},
    )
    assert item_text(fields) == "Hair Dryer 2000W Beauty Hair Care 12 b"


def test_nothing_gives_the_empty_text():
    assert item_text((None, "", "  ", [], [None], float("nan"))) == ""
    assert item_text(()) == ""


def test_first_alternative_with_text_wins():
    record = {"title": " ", "keywords": "machine picked", "brand": "B", "other": "x"}
    assert record_text(record, ("title|keywords", "absent|brand", "absent")) == "machine picked B"
    assert record_text({"title": "T", "keywords": "K"}, ("title|keywords",)) == "T"


def test_default_columns_are_texts_in_table_order():
    schema = pa.schema(
        {
            "item_id": pa.string(),
            "tags": pa.list_(pa.string()),
            "price": pa.float64(),
            "title": pa.large_string(),
            "kind": pa.dictionary(pa.int32(), pa.string()),
            "ids": pa.list_(pa.int64()),
            "service": pa.string(),
        }
    )
    assert default_text_columns(schema, ("item_id", "service")) == ("tags", "title", "kind")


@UNTIMED
@given(st.lists(VALUES, max_size=5))
def test_is_one_line_and_settled(fields: list[object]):
    text = item_text(fields)
    assert text == " ".join(text.split())
    assert item_text((text,)) == text
    assert text.split() == [word for field in fields for word in item_text((field,)).split()]


@UNTIMED
@given(st.lists(st.fixed_dictionaries({"a": VALUES, "b": VALUES, "c": VALUES}), max_size=6))
def test_columns_give_the_same_as_records(records: list[dict[str, object]]):
    columns = {name: [record[name] for record in records] for name in "abc"}
    texts = column_texts([[columns["b"], columns["a"]], [columns["c"]]])
    assert texts == [record_text(record, ("b|a", "c")) for record in records]


def test_attributes_keep_their_keys_and_the_entries_of_a_list():
    record = {
        "title": " red\tshoe\n",
        "keywords": "x",
        "brand": "",
        "categories": ["Beauty", None, "Hair  Care"],
        "n": 3,
    }
    text = record_attributes(record, ("title|keywords", "brand|n", "categories", "absent"))
    assert text == "title\tred shoe\nbrand\t3\ncategories\tBeauty\tHair Care"
    assert parse_attributes(text) == [
        ("title", ["red shoe"]),
        ("brand", ["3"]),
        ("categories", ["Beauty", "Hair Care"]),
    ]
    assert plain_text(text) == "red shoe 3 Beauty Hair Care"


def test_a_plain_text_is_one_value_without_a_key():
    assert parse_attributes("red shoe") == [("", ["red shoe"])]
    assert parse_attributes("") == []
    assert plain_text("red shoe") == "red shoe"


@UNTIMED
@given(st.lists(st.tuples(st.text(max_size=6), st.lists(st.text(max_size=9), max_size=3)), max_size=4))
def test_attributes_come_back_as_they_were_written(attributes: list[tuple[str, list[str]]]):
    cleaned = [
        (" ".join(key.split()), [" ".join(v.split()) for v in values if v.split()]) for key, values in attributes
    ]
    assert parse_attributes(format_attributes(attributes)) == [pair for pair in cleaned if pair[1]]


@UNTIMED
@given(
    st.dictionaries(st.sampled_from(["a", "b", "c"]), VALUES), st.lists(st.sampled_from(["a", "b|c", "d"]), max_size=3)
)
def test_attributes_without_their_keys_are_the_plain_text(record: dict[str, object], columns: list[str]):
    assert plain_text(record_attributes(record, columns)) == record_text(record, columns)
