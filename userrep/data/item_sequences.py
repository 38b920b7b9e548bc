"""Histories over an item dictionary -> token sequences: [CLS], then the items of a history, the most recent one first.

Source: Recformer, Li et al., KDD 2023 (arXiv 2305.13731, sections 2.1 and 2.2.1). Differs: none; sequences are packed.

Legend: `H` histories, `E` events that are read, `P` tokens of all sequences one after another.
"""

from dataclasses import dataclass

import numpy as np

from userrep.data.batch import HistoryBatch, gather_ranges
from userrep.data.key_values import KEY_FLAG

CLS_TYPE, KEY_TYPE, VALUE_TYPE = 0, 1, 2
NUM_TYPES = 3


@dataclass(frozen=True)
class TokenSequences:
    """Sequences, packed.

    Attributes:
        tokens: ids without flag, int64 (P,).
        types: of each token: 0 [CLS], 1 key, 2 value, int64 (P,).
        item_positions: 0 for [CLS], 1 for the tokens of the most recent item, and so on, int64 (P,).
        offsets: borders of the sequences, int64 (H + 1,). None is empty: each has its [CLS].
    """

    tokens: np.ndarray
    types: np.ndarray
    item_positions: np.ndarray
    offsets: np.ndarray


def item_sequences(batch: HistoryBatch, cls_id: int, max_items: int, max_tokens: int) -> TokenSequences:
    """Token sequences of all histories.

    Args:
        batch: histories, oldest event first; tokens of keys are flagged.
        cls_id: token that begins every sequence.
        max_items: of a history, the most recent ones, >= 1.
        max_tokens: of a sequence with its [CLS], >= 1; the rest is cut off, perhaps within an item.
    """
    histories = batch.history_offsets.astype(np.int64)
    num_events = np.minimum(np.diff(histories), max_items)
    ends = np.cumsum(num_events)
    rank_E = np.arange(num_events.sum()) - np.repeat(ends - num_events, num_events)  # 0: the most recent
    item_E = batch.history_items[np.repeat(histories[1:] - 1, num_events) - rank_E]

    starts_E = batch.token_offsets[item_E].astype(np.int64)
    lengths_E = batch.token_offsets[item_E + 1] - starts_E
    before_E = np.concatenate([[0], np.cumsum(lengths_E)])
    first = before_E[ends - num_events]  # tokens of the histories before
    room_E = max_tokens - 1 - (before_E[:-1] - np.repeat(first, num_events))
    lengths_E = np.clip(lengths_E, 0, np.maximum(room_E, 0))

    positions, borders_E = gather_ranges(starts_E, lengths_E)
    num_tokens = borders_E[ends] - borders_E[ends - num_events]
    offsets = np.concatenate([[0], np.cumsum(num_tokens + 1)])
    is_token = np.ones(offsets[-1], dtype=bool)
    is_token[offsets[:-1]] = False
    flagged = batch.tokens[positions]
    return TokenSequences(
        tokens=_between(is_token, flagged & ~KEY_FLAG, cls_id),
        types=_between(is_token, np.where(flagged & KEY_FLAG, KEY_TYPE, VALUE_TYPE), CLS_TYPE),
        item_positions=_between(is_token, np.repeat(rank_E + 1, lengths_E), 0),
        offsets=offsets,
    )


def _between(is_token: np.ndarray, values: np.ndarray, cls_value: int) -> np.ndarray:
    filled = np.full(len(is_token), cls_value, dtype=np.int64)
    filled[is_token] = values
    return filled
