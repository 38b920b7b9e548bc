"""Random batches whose tokens are those of item attributes."""

import numpy as np

from userrep.data.batch import HistoryBatch
from userrep.data.key_values import KEY_FLAG


def random_histories(
    num_histories: int, num_items: int, max_events: int, max_item_tokens: int, vocab_size: int, seed: int
) -> HistoryBatch:
    """Histories of 1 to max_events items, each of 1 to max_item_tokens tokens, of which some are flagged as keys."""
    rng = np.random.default_rng(seed)
    item_lengths = rng.integers(1, max_item_tokens + 1, num_items)
    lengths = rng.integers(1, max_events + 1, num_histories)
    tokens = rng.integers(0, vocab_size, item_lengths.sum())
    is_key = rng.random(len(tokens)) < 0.3
    return HistoryBatch(
        tokens=np.where(is_key, tokens | KEY_FLAG, tokens).astype(np.int32),
        token_offsets=np.concatenate([[0], item_lengths.cumsum()]).astype(np.int32),
        history_items=rng.integers(0, num_items, lengths.sum()).astype(np.int32),
        history_offsets=np.concatenate([[0], lengths.cumsum()]).astype(np.int32),
        item_keys=np.arange(num_items),
    )
