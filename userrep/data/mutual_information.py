"""Mutual information of all pairs of features, from one pass over the items in any order and partition.

Source: Yao et al. 2021 (arXiv 2007.12865, section 3.2): MI(V_i, V_j) = sum P(v_i, v_j) log(P(v_i, v_j) / (P(v_i)
P(v_j))) over the values of two features.
Differs: the paper does not say what a multi-valued feature is here. An item with m values of one feature and n of the
other adds 1 / (m n) to each of its m n pairs, so every item counts once. No value is a value of its own. Numbers are
cut into bins of half a standard deviation. Values are those that a model sees: rare ones that share an id are one.

Legend: `N` items, `K` features, `P` pairs of values that occur together in some item.
"""

from collections.abc import Iterable
from itertools import combinations

import numpy as np

from userrep.data.batch import gather_ranges
from userrep.data.feature_vocabulary import FeatureVocabulary
from userrep.data.features import ItemFeatures, RaggedFeature

MISSING = 0  # code of no value; codes of values start at 1
MAX_VALUES = 255  # of an item and feature; further ones are left out here, so that the divisor m n fits its bits
DIVISOR_BITS = 16
DENSE_BINS, DENSE_BIN_WIDTH = 13, 0.5  # of standardised numbers: the outer bins begin at 3 standard deviations
Counts = tuple[np.ndarray, np.ndarray]  # of one pair of features: codes and how many items, both int64, codes ascending


class MutualInformation:
    """Counts of a part of the items; parts are merged into the counts of all.

    They are whole numbers for each (pair of values, divisor m n), so the result is the same number, bit for bit,
    however the items are dealt to parts.
    """

    def __init__(self, vocabularies: tuple[FeatureVocabulary, ...]) -> None:
        """Raises: ValueError where two features have more values than a 64-bit code tells apart."""
        self._sizes = [_num_codes(vocabulary) for vocabulary in vocabularies]
        self._pairs = list(combinations(range(len(vocabularies)), 2))
        for left, right in self._pairs:
            if self._sizes[left] * self._sizes[right] >= 1 << (63 - DIVISOR_BITS):
                names = [vocabularies[number].config.name for number in (left, right)]
                raise ValueError(
                    f"features {names} have {self._sizes[left]:,} and {self._sizes[right]:,} values: mutual "
                    f"information takes a product below 2^{63 - DIVISOR_BITS}; lower vocabulary_size or num_buckets"
                )
        empty = np.zeros(0, dtype=np.int64)
        self.counts: list[Counts] = [(empty, empty) for _ in self._pairs]

    def add(self, items: ItemFeatures) -> None:
        """Counts items, each once."""
        coded = [_codes(feature) for feature in items.features]
        parts = []
        for left, right in self._pairs:
            codes, counts = np.unique(_pair_codes(coded[left], coded[right], self._sizes[right]), return_counts=True)
            parts.append((codes, counts))
        self.merge(parts)

    def merge(self, counts: Iterable[Counts]) -> None:
        """Adds the `counts` of other items."""
        self.counts = [_sum(own, other) for own, other in zip(self.counts, counts, strict=True)]

    def result(self) -> np.ndarray:
        """Symmetric float64 (K, K), in nats, >= 0; the diagonal, which no one asks for, is 0.

        Raises:
            ValueError: no item was counted.
        """
        matrix_KK = np.zeros((len(self._sizes), len(self._sizes)))
        for (left, right), (codes, counts) in zip(self._pairs, self.counts, strict=True):
            if not len(codes):
                raise ValueError("no item was counted: mutual information needs at least one")
            value = _mutual_information(codes, counts, self._sizes[right])
            matrix_KK[left, right] = matrix_KK[right, left] = value
        return matrix_KK


def _num_codes(vocabulary: FeatureVocabulary) -> int:
    return 1 + (DENSE_BINS if vocabulary.config.kind == "dense" else vocabulary.num_ids)


def _codes(feature: RaggedFeature) -> RaggedFeature:
    """The feature with a code for every value, at least one and at most `MAX_VALUES` for every item."""
    values = feature.values
    if values.dtype == np.float32:
        half = DENSE_BINS // 2
        values = np.clip(np.rint(values / DENSE_BIN_WIDTH), -half, half) + half
    lengths = np.minimum(np.diff(feature.offsets), MAX_VALUES)
    positions, _ = gather_ranges(feature.offsets[:-1], lengths)
    is_missing = lengths == 0
    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 1))])
    codes = np.full(starts[-1], MISSING, dtype=np.int64)
    codes[np.repeat(~is_missing, np.maximum(lengths, 1))] = values[positions].astype(np.int64) + 1
    return RaggedFeature(codes, starts)


def _pair_codes(left: RaggedFeature, right: RaggedFeature, right_size: int) -> np.ndarray:
    """Code of every pair of values of every item: (left, right, divisor)."""
    left_lengths, right_lengths = np.diff(left.offsets), np.diff(right.offsets)
    item_of_left = np.repeat(np.arange(len(left_lengths)), left_lengths)
    positions, offsets = gather_ranges(right.offsets[:-1][item_of_left], right_lengths[item_of_left])
    left_of_pair = np.repeat(np.arange(len(left.values)), np.diff(offsets))
    divisors = (left_lengths * right_lengths)[item_of_left[left_of_pair]]
    pairs = left.values[left_of_pair] * right_size + right.values[positions]
    return (pairs << DIVISOR_BITS) + divisors


def _sum(one: Counts, other: Counts) -> Counts:
    codes, place = np.unique(np.concatenate([one[0], other[0]]), return_inverse=True)
    total = np.zeros(len(codes), dtype=np.int64)
    np.add.at(total, place, np.concatenate([one[1], other[1]]))
    return codes, total


def _mutual_information(codes: np.ndarray, counts: np.ndarray, right_size: int) -> float:
    weights = counts / (codes & ((1 << DIVISOR_BITS) - 1))
    pairs, starts = np.unique(codes >> DIVISOR_BITS, return_index=True)  # codes of one pair lie side by side
    joint_P = np.add.reduceat(weights, starts)
    joint_P /= joint_P.sum()
    # Of both features the sums over the other one, looked up at each pair.
    left_P, right_P = (_marginal(values, joint_P) for values in np.divmod(pairs, right_size))
    return max(0.0, float((joint_P * (np.log(joint_P) - np.log(left_P) - np.log(right_P))).sum()))


def _marginal(values: np.ndarray, joint_P: np.ndarray) -> np.ndarray:
    _, place = np.unique(values, return_inverse=True)
    return np.bincount(place, weights=joint_P)[place]
