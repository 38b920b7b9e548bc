"""Mutual information against a table of all pairs, in any partition."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from userrep.data.feature_vocabulary import FeatureConfig, FeatureVocabulary, ValueCounts, raw_values
from userrep.data.features import ItemFeatures
from userrep.data.mutual_information import MutualInformation

CONFIGS = (
    FeatureConfig(name="id", kind="id"),
    FeatureConfig(name="brand", kind="categorical", attribute="brand"),
    FeatureConfig(name="category", kind="multi_hot", attribute="category"),
    FeatureConfig(name="words", kind="bag", attribute="title"),
)


def draw_items(size: int = 60) -> tuple[list[str], list[list[tuple[str, list[str]]]]]:
    """Categories follow from the brand, mostly; some items lack an attribute."""
    rng = np.random.default_rng(0)
    attributes = []
    for _ in range(size):
        brand = int(rng.integers(4))
        categories = [f"c{brand}"] + [f"c{n}" for n in rng.integers(0, 6, rng.integers(0, 3))]
        words = " ".join(f"w{n}" for n in rng.integers(0, 9, rng.integers(0, 5)))
        given = [("brand", [f"b{brand}"]), ("category", categories), ("title", [words])]
        attributes.append([pair for pair in given if rng.random() < 0.9])
    return [f"i{n}" for n in range(size)], attributes


def naive(ids: list[str], attributes: list[list[tuple[str, list[str]]]]) -> np.ndarray:
    matrix = np.zeros((len(CONFIGS), len(CONFIGS)))
    for i, j in itertools.permutations(range(len(CONFIGS)), 2):
        joint, left, right = Counter(), Counter(), Counter()
        for item, given in zip(ids, attributes, strict=True):
            a_values, b_values = (raw_values(CONFIGS[n], item, given) or [None] for n in (i, j))
            for a, b in itertools.product(a_values, b_values):
                weight = 1 / len(a_values) / len(b_values) / len(ids)
                joint[a, b] += weight
                left[a] += weight
                right[b] += weight
        matrix[i, j] = sum(p * math.log(p / left[a] / right[b]) for (a, b), p in joint.items())
    return matrix


def vocabularies_of(ids: list[str], attributes: list[list[tuple[str, list[str]]]]) -> tuple[FeatureVocabulary, ...]:
    counts = ValueCounts(CONFIGS)
    counts.add(ids, attributes)
    return counts.vocabularies()


def test_equals_the_table_of_all_pairs() -> None:
    ids, attributes = draw_items()
    vocabularies = vocabularies_of(ids, attributes)
    information = MutualInformation(vocabularies)
    information.add(ItemFeatures.of(ids, attributes, vocabularies))
    result = information.result()
    np.testing.assert_allclose(result, naive(ids, attributes), rtol=1e-12, atol=1e-14)
    assert result[1, 2] > 3 * result[1, 3]  # a brand tells of categories, not of words


@pytest.mark.parametrize("seed", range(3))
def test_any_partition_and_order_give_the_same_number(seed: int) -> None:
    ids, attributes = draw_items()
    vocabularies = vocabularies_of(ids, attributes)
    rng = np.random.default_rng(seed)
    order, borders = rng.permutation(len(ids)), np.sort(rng.integers(0, len(ids) + 1, 4))
    total = MutualInformation(vocabularies)
    for part in np.split(order, borders):
        counted = MutualInformation(vocabularies)
        counted.add(ItemFeatures.of([ids[n] for n in part], [attributes[n] for n in part], vocabularies))
        total.merge(counted.counts)
    whole = MutualInformation(vocabularies)
    whole.add(ItemFeatures.of(ids, attributes, vocabularies))
    assert np.array_equal(total.result(), whole.result())


def test_numbers_tell_of_the_category_that_they_follow_from() -> None:
    configs = (
        FeatureConfig(name="price", kind="dense", attribute="price"),
        FeatureConfig(name="brand", kind="categorical", attribute="brand"),
    )
    for prices, expected in (([1.0, 1.0, 9.0, 9.0], math.log(2)), ([1.0, 9.0, 1.0, 9.0], 0.0)):
        attributes = [
            [("price", [str(price)]), ("brand", [brand])] for price, brand in zip(prices, "aabb", strict=True)
        ]
        counts = ValueCounts(configs)
        counts.add("wxyz", attributes)
        information = MutualInformation(counts.vocabularies())
        information.add(ItemFeatures.of("wxyz", attributes, counts.vocabularies()))
        assert information.result()[0, 1] == pytest.approx(expected, abs=1e-14)


def test_what_cannot_be_counted_is_refused() -> None:
    ids, attributes = draw_items(5)
    with pytest.raises(ValueError, match="no item was counted"):
        MutualInformation(vocabularies_of(ids, attributes)).result()
    huge = FeatureVocabulary(FeatureConfig(name="x", kind="id", num_buckets=1 << 24))
    with pytest.raises(ValueError, match="lower vocabulary_size"):
        MutualInformation((huge, huge))
