"""Features of items and their vocabularies: from an item's attributes to ids, a function of counts alone."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from userrep.config import Config

Attributes = Sequence[tuple[str, Sequence[str]]]  # of one item, as `item_text.parse_attributes` gives them
FeatureKind = Literal["id", "categorical", "multi_hot", "bag", "dense"]
MULTI_VALUED: tuple[FeatureKind, ...] = ("multi_hot", "bag")
WORD = re.compile(r"\w+")
KEY_COLUMN = "item_key"


class FeatureConfig(Config):
    """One feature of an item.

    Kinds: `id` is the item itself; `categorical` the attribute's first value; `multi_hot` each of its values, once;
    `bag` each word of its values, in lower case, once; `dense` its first value as a number, standardised over the
    corpus.
    """

    name: str = Field(min_length=1)
    kind: FeatureKind
    attribute: str = ""  # key of the attribute that is read; "" is that of a plain text; not used by `id`
    vocabulary_size: int | None = Field(default=None, ge=0)  # most frequent values with an id of their own; None: all
    num_buckets: int = Field(default=1, ge=0)  # ids that all other values share, by hash; with 0 they are dropped
    dim: int = Field(default=32, ge=1)  # of the embedding; a dense feature is one number

    @model_validator(mode="after")
    def _has_ids(self) -> Self:
        if self.vocabulary_size == 0 and self.num_buckets == 0:
            raise ValueError(f"feature {self.name}: vocabulary_size 0 and num_buckets 0 leave no id: raise one of them")
        return self


def check_features(configs: Sequence[FeatureConfig]) -> None:
    """Refuses features that cannot be told apart.

    Raises:
        ValueError: no feature, or two of one name, or a name that the table needs itself.
    """
    names = [config.name for config in configs]
    if not names or len(set(names)) < len(names) or KEY_COLUMN in names:
        raise ValueError(f"features {names}: give at least one, each name once, none of them {KEY_COLUMN!r}")


def raw_values(config: FeatureConfig, item_id: str, attributes: Attributes) -> list[str]:
    """An item's values of a feature as text, each once, in their order."""
    if config.kind == "id":
        return [item_id]
    values = [value for key, given in attributes if key == config.attribute for value in given]
    if config.kind == "bag":
        values = [word for value in values for word in WORD.findall(value.lower())]
    if config.kind in MULTI_VALUED:
        return list(dict.fromkeys(values))
    return values[:1]


class ValueCounts:
    """How many items have each value of each feature. Parts add up to the same counts in any order."""

    def __init__(self, configs: Sequence[FeatureConfig]) -> None:
        check_features(configs)
        self.configs = tuple(configs)
        self.counts: list[Counter[str]] = [Counter() for _ in configs]

    def add(self, item_ids: Iterable[str], attributes: Iterable[Attributes]) -> None:
        """Counts items."""
        for item_id, item_attributes in zip(item_ids, attributes, strict=True):
            for config, counter in zip(self.configs, self.counts, strict=True):
                counter.update(raw_values(config, item_id, item_attributes))

    def merge(self, counts: Iterable[Mapping[str, int]]) -> None:
        """Adds the counts of other items, one mapping per feature."""
        for counter, other in zip(self.counts, counts, strict=True):
            counter.update(other)

    def vocabularies(self) -> "tuple[FeatureVocabulary, ...]":
        """What the features' values are turned into."""
        return tuple(
            FeatureVocabulary.of(config, counts) for config, counts in zip(self.configs, self.counts, strict=True)
        )


@dataclass(frozen=True)
class FeatureVocabulary:
    """From the values of a feature to ids, or of a dense one to standardised numbers.

    Attributes:
        config: the feature.
        values: those with an id of their own, most frequent first, equally frequent ones in the order of their text.
        mean: of a dense feature over the items that have it.
        std: likewise; 1 where all are equal.
    """

    config: FeatureConfig
    values: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0

    @classmethod
    def of(cls, config: FeatureConfig, counts: Mapping[str, int]) -> "FeatureVocabulary":
        """FeatureVocabulary of values that so many items have; a function of the counts, not of their order.

        Raises:
            ValueError: a value of a dense feature is no finite number.
        """
        if config.kind != "dense":
            ranked = sorted(counts, key=lambda value: (-counts[value], value))
            return cls(config, tuple(ranked[: config.vocabulary_size]))
        if not counts:
            return cls(config)
        values = sorted(counts)
        numbers = np.array([_number(config, value) for value in values])
        weights = np.array([counts[value] for value in values])
        mean = float(np.average(numbers, weights=weights))
        std = float(np.average((numbers - mean) ** 2, weights=weights) ** 0.5)
        return cls(config, mean=mean, std=std or 1.0)

    @property
    def num_ids(self) -> int:
        """Rows of the embedding table; 0 for a dense feature."""
        return 0 if self.config.kind == "dense" else len(self.values) + self.config.num_buckets

    def ids(self) -> dict[str, int]:
        """Id of every value that has one of its own."""
        return {value: number for number, value in enumerate(self.values)}

    def encode(self, values: Sequence[str], ids: Mapping[str, int]) -> list[int] | list[float]:
        """Ids of an item's values, each once; of a dense feature at most one number.

        Args:
            values: from `raw_values`.
            ids: from `ids`.
        """
        if self.config.kind == "dense":
            return [(_number(self.config, value) - self.mean) / self.std for value in values]
        found = (ids.get(value, -1) for value in values)
        if self.config.num_buckets:
            found = (
                number if number >= 0 else self._bucket(value) for number, value in zip(found, values, strict=True)
            )
        return list(dict.fromkeys(number for number in found if number >= 0))

    def _bucket(self, value: str) -> int:
        digest = hashlib.blake2b(value.encode(), digest_size=8).digest()
        return len(self.values) + int.from_bytes(digest, "little") % self.config.num_buckets


def _number(config: FeatureConfig, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"dense feature {config.name}: {value!r} is no finite number; clean it, or use categorical")
    return number
