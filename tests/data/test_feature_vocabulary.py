"""Vocabularies as functions of counts, and what cannot be a feature."""

import pytest

from tests.data.test_features import CONFIGS, TEXTS, attributes
from userrep.data.feature_vocabulary import FeatureConfig, FeatureVocabulary, ValueCounts


def test_unknown_values_go_to_the_bucket_of_their_text() -> None:
    vocabulary = FeatureVocabulary(FeatureConfig(name="x", kind="multi_hot", num_buckets=7), ("known",))
    found = vocabulary.encode([f"value {n}" for n in range(200)], vocabulary.ids())
    assert sorted(found) == list(range(1, 8))
    assert vocabulary.encode(["value 3"], vocabulary.ids()) == vocabulary.encode(["value 3"], vocabulary.ids())


def test_counts_of_parts_are_the_counts_of_all() -> None:
    whole, one, other = (ValueCounts(CONFIGS) for _ in range(3))
    whole.add(TEXTS, attributes())
    one.add(list(TEXTS)[2:], attributes()[2:])
    other.add(list(TEXTS)[:2], attributes()[:2])
    one.merge(other.counts)
    assert one.vocabularies() == whole.vocabularies()


@pytest.mark.parametrize("value", ["cheap", "nan", "inf"])
def test_dense_values_are_numbers(value: str) -> None:
    counts = ValueCounts(CONFIGS[4:])
    counts.add(["a"], [[("price", [value])]])
    with pytest.raises(ValueError, match="dense feature price"):
        counts.vocabularies()


def test_equal_dense_values_are_zero() -> None:
    counts = ValueCounts(CONFIGS[4:])
    counts.add(["a", "b"], [[("price", ["3"])]] * 2)
    (vocabulary,) = counts.vocabularies()
    assert vocabulary.encode(["3"], {}) == [0.0]


def test_features_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="leave no id"):
        FeatureConfig(name="x", kind="id", vocabulary_size=0, num_buckets=0)
    for configs in ((), CONFIGS[:1] * 2, (FeatureConfig(name="item_key", kind="id"),)):
        with pytest.raises(ValueError, match="each name once"):
            ValueCounts(configs)
