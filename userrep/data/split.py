"""Everything that is a pure function of an id: its 64-bit key, and of a user the shard and the split."""

from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field, model_validator

from userrep.config import Config

SPLITS = ("train", "validation", "test")
UINT64_SPAN = 2.0**64
# Odd multipliers of splitmix64 (Steele et al., "Fast splittable pseudorandom number generators", OOPSLA 2014).
MIX_1, MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class SplitConfig(Config):
    """Held-out users. A user's split never changes when users are added."""

    validation: float = Field(default=0.08, ge=0, le=1)
    test: float = Field(default=0.08, ge=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _shares_of_one(self) -> Self:
        if self.validation + self.test > 1:
            raise ValueError(f"validation {self.validation} + test {self.test} exceed all users: lower one of them")
        return self


def id_keys(ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """64-bit keys of ids of users or items, uint64 (N,): equal in every process and on every machine.

    They are SipHash with a fixed key. pandas hashes Python strings, which live no longer than this call.
    """
    return pd.util.hash_array(np.asarray(ids.to_numpy(zero_copy_only=False), dtype=object), categorize=False)


def mix(keys: np.ndarray, seed: int) -> np.ndarray:
    """Seeded bijection of uint64 keys; the results for two seeds are unrelated."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        mixed = keys + np.uint64((seed + 1) * GOLDEN_GAMMA % 2**64)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * MIX_2
    return mixed ^ (mixed >> np.uint64(31))


def unit_interval(keys: np.ndarray, seed: int) -> np.ndarray:
    """Maps keys to float64 in [0, 1), uniform and reproducible."""
    return mix(keys, seed) / UINT64_SPAN


def assign_splits(keys: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Split index of each user, int8 (N,): 0 train, 1 validation, 2 test."""
    position = unit_interval(keys, config.seed)
    return np.where(position < config.test, 2, np.where(position < config.test + config.validation, 1, 0)).astype(
        np.int8
    )


def assign_buckets(keys: np.ndarray, num_buckets: int) -> np.ndarray:
    """Shard index of each user, int32 (N,) in [0, num_buckets). Independent of the split."""
    return (keys % np.uint64(num_buckets)).astype(np.int32)
