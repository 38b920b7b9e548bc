"""A world with a rule: the next item is a fixed function of the last one."""

import numpy as np
import pyarrow as pa

from benchmarks.next_item.data_set import DataSet
from userrep.data.leave_one_out import LeaveOneOut, Sequences
from userrep.data.split import id_keys

NUM_ITEMS = 12
WORDS = ["amber", "birch", "cedar", "dune", "ember", "fern", "grove", "heron", "iris", "jade", "kelp", "larch"]


def make_data_set(sequences: list[list[int]], texts: list[str]) -> DataSet:
    """Users with the given item numbers, in the order given."""
    user_ids = pa.array([f"u{number:04d}" for number in range(len(sequences))])
    offsets = np.cumsum([0, *map(len, sequences)])
    split = LeaveOneOut(
        user_ids=user_ids,
        keys=id_keys(user_ids),
        events=Sequences(np.concatenate(sequences).astype(np.int32), offsets),
        item_ids=pa.array([f"i{number:04d}" for number in range(len(texts))]),
        tokens=np.arange(len(texts), dtype=np.int32),
        token_offsets=np.arange(len(texts) + 1),
    )
    return DataSet("planted", split, texts, np.arange(len(sequences)))


def planted(num_users: int = 300, seed: int = 0) -> DataSet:
    """Walks of 5 to 14 items on one random cycle through all items, from random starts."""
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(NUM_ITEMS)
    follows = np.empty(NUM_ITEMS, dtype=np.int64)
    follows[cycle] = np.roll(cycle, -1)
    sequences = []
    for _ in range(num_users):
        walk = [int(rng.integers(NUM_ITEMS))]
        for _ in range(int(rng.integers(4, 14))):
            walk.append(int(follows[walk[-1]]))
        sequences.append(walk)
    return make_data_set(sequences, WORDS)
