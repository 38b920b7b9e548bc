"""Token sequences of histories against a loop over them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.histories import random_histories
from userrep.data.batch import HistoryBatch
from userrep.data.item_sequences import item_sequences
from userrep.data.key_values import KEY_FLAG

CLS_ID = 777


def loop(batch: HistoryBatch, max_items: int, max_tokens: int) -> list[list[tuple[int, int, int]]]:
    found = []
    for start, stop in zip(batch.history_offsets[:-1], batch.history_offsets[1:], strict=True):
        sequence = [(CLS_ID, 0, 0)]
        for place, item in enumerate(batch.history_items[start:stop][::-1][:max_items]):
            for token in batch.tokens[batch.token_offsets[item] : batch.token_offsets[item + 1]].tolist():
                sequence.append((token & ~KEY_FLAG, 1 if token & KEY_FLAG else 2, place + 1))
        found.append(sequence[:max_tokens])
    return found


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 8), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99)
)
def test_sequences_are_those_of_a_loop(
    num_histories: int, max_events: int, max_items: int, max_tokens: int, item_tokens: int, seed: int
) -> None:
    batch = random_histories(num_histories, 5, max_events, item_tokens, 50, seed)
    found = item_sequences(batch, CLS_ID, max_items, max_tokens)
    triples = np.stack([found.tokens, found.types, found.item_positions], axis=1)
    received = [list(map(tuple, part.tolist())) for part in np.split(triples, found.offsets[1:-1])]
    assert received == loop(batch, max_items, max_tokens)


@pytest.mark.parametrize("lengths", [[0], [0, 2, 0], [1, 0]])
def test_an_empty_history_is_its_cls(lengths: list[int]) -> None:
    batch = HistoryBatch(
        tokens=np.array([5, 6], np.int32),
        token_offsets=np.array([0, 2], np.int32),
        history_items=np.zeros(sum(lengths), np.int32),
        history_offsets=np.cumsum([0, *lengths]).astype(np.int32),
        item_keys=np.arange(1),
    )
    found = item_sequences(batch, CLS_ID, 3, 9)
    assert np.diff(found.offsets).tolist() == [1 + 2 * length for length in lengths]
    assert found.tokens[found.offsets[:-1]].tolist() == [CLS_ID] * len(lengths)
