"""Batches as flat arrays: the unique items of the batch with packed tokens, and histories as references to them.

Legend: `H` histories, `E` events in all of them, `U` unique items, `T` tokens of the unique items, `B` users.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

# Positions of the tokens of an item dictionary and the borders of its items -> those that stay, at least one per item.
TokenFilter = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class HistoryBatch:
    """Histories over a dictionary in which every item stands once.

    Attributes:
        tokens: ids of all items, one after another, int32 (T,).
        token_offsets: borders of the items in `tokens`, int32 (U + 1,).
        history_items: item references of all events, int32 (E,).
        history_offsets: borders of the histories in `history_items`, int32 (H + 1,). No history is empty.
        item_keys: 64-bit keys of the unique items as int64 (U,); equal keys are the same item, in every batch and on
            every worker.
    """

    tokens: np.ndarray
    token_offsets: np.ndarray
    history_items: np.ndarray
    history_offsets: np.ndarray
    item_keys: np.ndarray

    @property
    def latest_items(self) -> np.ndarray:
        """The last item that is seen of every history, in a history the most recent one: references, (H,)."""
        return self.history_items[self.history_offsets[1:] - 1]


@dataclass(frozen=True)
class UserBatch(HistoryBatch):
    """Two views of each user. Histories 0..B-1 are the anchors, B..2B-1 the positives.

    Attributes:
        user_keys: 64-bit keys of the users as int64 (B,); equal keys are the same user.
        service_pairs: the group of samples that a sample has its negatives in, int64 (B,): 1 + 256 * the anchor's
            service + the positive's where the views are two services, 0 where they are parts of the same events; and in
            a mixture of tables 65536 * the number of the table on top.
        step: optimizer step of the run that this batch belongs to.
    """

    user_keys: np.ndarray
    service_pairs: np.ndarray
    step: int

    @property
    def positive_item_keys(self) -> np.ndarray:
        """Key of the last item of every positive, int64 (B,)."""
        return self.item_keys[self.latest_items[len(self.user_keys) :]]


def gather_ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the ranges [start, start + length) one after another, and their borders.

    Args:
        starts: first position of each range, (N,).
        lengths: size of each range, >= 0, (N,).

    Returns:
        Positions, int64 (sum of lengths,), and borders, int64 (N + 1,).
    """
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    positions = np.arange(offsets[-1]) + np.repeat(np.asarray(starts) - offsets[:-1], lengths)
    return positions, offsets


def compact(
    items: np.ndarray, tokens: np.ndarray, token_offsets: np.ndarray, token_filter: TokenFilter | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Reduces an item dictionary to the items that are referred to.

    Args:
        items: references into the dictionary, (E,).
        tokens: packed tokens of the dictionary.
        token_offsets: borders of its items.
        token_filter: what to leave out of the items that are used; default: nothing.

    Returns:
        References into the reduced dictionary, its tokens, its borders, all int32; and which items it holds, (U,).
    """
    is_used = np.zeros(len(token_offsets) - 1, dtype=bool)  # marking costs less than sorting the references
    is_used[items] = True
    used, references = np.flatnonzero(is_used), (np.cumsum(is_used) - 1)[items]
    positions, offsets = gather_ranges(token_offsets[used], token_offsets[used + 1] - token_offsets[used])
    if token_filter is not None:
        positions, offsets = token_filter(positions, offsets)
    return references.astype(np.int32), tokens[positions].astype(np.int32), offsets.astype(np.int32), used


ARRAYS = (
    "tokens",
    "token_offsets",
    "history_items",
    "history_offsets",
    "user_keys",
    "service_pairs",
    "item_keys",
)


def to_table(batch: UserBatch) -> pa.Table:
    """One row that holds a whole batch: the unit in which Ray Data deals batches to workers."""
    columns = {name: pa.ListArray.from_arrays([0, len(getattr(batch, name))], getattr(batch, name)) for name in ARRAYS}
    return pa.table({**columns, "step": [batch.step]})


def from_table(table: pa.Table) -> UserBatch:
    """Inverse of `to_table`, without a copy.

    Raises:
        ValueError: the table holds more than one batch, so the stream's blocks were merged.
    """
    if table.num_rows != 1:
        raise ValueError(
            f"a block of the stream holds {table.num_rows} batches instead of 1: it is none of TrainingStream.dataset"
        )
    arrays = {name: table[name].combine_chunks().flatten().to_numpy() for name in ARRAYS}
    return UserBatch(**arrays, step=table["step"][0].as_py())
