"""Vocabularies and ragged ids of item features, by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from userrep.data.feature_vocabulary import FeatureConfig, ValueCounts
from userrep.data.features import ItemFeatures, RaggedFeature, concat_features
from userrep.data.item_text import parse_attributes
from userrep.data.split import id_keys

CONFIGS = (
    FeatureConfig(name="id", kind="id"),
    FeatureConfig(name="brand", kind="categorical", attribute="brand", vocabulary_size=1, num_buckets=2),
    FeatureConfig(name="category", kind="multi_hot", attribute="categories", vocabulary_size=2, num_buckets=0),
    FeatureConfig(name="words", kind="bag", attribute="title"),
    FeatureConfig(name="price", kind="dense", attribute="price"),
)
TEXTS = {
    "b": "title\tRed shoe, red\nbrand\tacme\ncategories\tshoes\tsale\nprice\t10",
    "a": "title\tblue SHOE\nbrand\tacme\ncategories\tshoes\thats\tshoes\nprice\t30",
    "c": "brand\tzen\ncategories\tsale",
    "d": "title\that\nbrand\tother\ncategories\thats\tcaps",
}


def attributes() -> list[list[tuple[str, list[str]]]]:
    return [parse_attributes(text) for text in TEXTS.values()]


def encoded() -> ItemFeatures:
    counts = ValueCounts(CONFIGS)
    counts.add(TEXTS, attributes())
    return ItemFeatures.of(list(TEXTS), attributes(), counts.vocabularies())


def lists(items: ItemFeatures, name: str) -> dict[str, list[float]]:
    """Values of a feature by item."""
    (number,) = [i for i, vocabulary in enumerate(items.vocabularies) if vocabulary.config.name == name]
    feature, rows = items.features[number], items.rows(id_keys(pa.array(list(TEXTS))))
    return {
        item: feature.values[feature.offsets[row] : feature.offsets[row + 1]].tolist()
        for item, row in zip(TEXTS, rows, strict=True)
    }


def test_most_frequent_values_have_ids_of_their_own_and_ties_go_by_text() -> None:
    by_name = {vocabulary.config.name: vocabulary for vocabulary in encoded().vocabularies}
    assert by_name["id"].values == ("a", "b", "c", "d")
    assert by_name["brand"].values == ("acme",)
    assert by_name["category"].values == ("hats", "sale")  # each in two items, as shoes is; a value counts once an item
    assert by_name["words"].values == ("shoe", "blue", "hat", "red")
    assert [v.num_ids for v in by_name.values()] == [5, 3, 2, 5, 0]


def test_values_are_encoded_by_kind() -> None:
    items = encoded()
    assert lists(items, "id") == {"a": [0], "b": [1], "c": [2], "d": [3]}
    assert lists(items, "category") == {"b": [1], "a": [0], "c": [1], "d": [0]}  # without a bucket, rare ones vanish
    assert lists(items, "words") == {"b": [3, 0], "a": [1, 0], "c": [], "d": [2]}
    assert lists(items, "price") == {"b": [-1], "a": [1], "c": [], "d": []}
    brands = lists(items, "brand")
    assert brands["b"] == brands["a"] == [0]
    assert {*brands["c"], *brands["d"]} <= {1, 2}


def test_features_survive_a_directory(tmp_path: Path) -> None:
    items = encoded()
    items.save(tmp_path)
    loaded = ItemFeatures.load(tmp_path)
    assert loaded.vocabularies == items.vocabularies
    assert np.array_equal(loaded.keys, items.keys)
    for actual, expected in zip(loaded.features, items.features, strict=True):
        for name in ("values", "offsets"):
            assert getattr(actual, name).dtype == getattr(expected, name).dtype
            assert np.array_equal(getattr(actual, name), getattr(expected, name))


def test_of_equal_items_the_first_one_counts() -> None:
    whole = encoded()
    table = whole.to_table()
    mixed = pa.concat_tables([table.slice(2), table.slice(0, 2), table.slice(1, 3)])
    assert ItemFeatures.from_table(mixed, whole.vocabularies).to_table() == table
    twice = ItemFeatures.of(["b", "b"], [[], attributes()[0]], whole.vocabularies)
    assert len(twice) == 1
    assert len(twice.features[1].values) == 0


def test_unknown_items_are_an_error() -> None:
    items = encoded()
    assert np.array_equal(items.rows(items.keys.view(np.int64)[::-1]), [3, 2, 1, 0])
    with pytest.raises(ValueError, match="1 of 2 items are not among the 4 with features"):
        items.rows(np.array([items.keys[0], 5], dtype=np.uint64))


def test_ragged_values_are_taken_and_kept() -> None:
    feature = RaggedFeature(np.arange(6), np.array([0, 2, 2, 6]))
    taken = feature.take(np.array([2, 1, 2]))
    assert taken.values.tolist() == [2, 3, 4, 5, 2, 3, 4, 5]
    assert taken.offsets.tolist() == [0, 4, 4, 8]
    joined = concat_features([[feature], [taken]])[0]
    assert joined.values.tolist() == feature.values.tolist() + taken.values.tolist()
    assert joined.offsets.tolist() == [0, 2, 2, 6, 10, 10, 14]
    kept = feature.keep(np.array([0, 0, 1, 0, 1, 1], dtype=bool))
    assert (kept.values.tolist(), kept.offsets.tolist()) == ([2, 4, 5], [0, 0, 0, 3])
