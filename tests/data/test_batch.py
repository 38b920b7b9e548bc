import itertools
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.data.batch import ARRAYS, UserBatch, compact, from_table, gather_ranges, to_table

RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 5)), max_size=12)


@given(RANGES)
def test_ranges_stand_one_after_another(ranges: list[tuple[int, int]]):
    starts, lengths = (np.array([pair[n] for pair in ranges], np.int64) for n in (0, 1))
    positions, offsets = gather_ranges(starts, lengths)
    assert len(offsets) == len(ranges) + 1
    assert offsets[-1] == len(positions)
    pieces = [positions[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert pieces == [list(range(start, start + length)) for start, length in ranges]


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=4), min_size=1, max_size=8), st.data())
def test_a_reduced_dictionary_says_the_same_and_holds_nothing_else(items: list[list[int]], data: st.DataObject):
    references = data.draw(st.lists(st.integers(0, len(items) - 1), max_size=12))
    flat = np.array([token for item in items for token in item], np.int32)
    offsets = np.cumsum([0] + [len(item) for item in items])
    reduced, tokens, borders, used = compact(np.array(references, np.int64), flat, offsets)
    dictionary = [tokens[a:b].tolist() for a, b in itertools.pairwise(borders)]
    assert [dictionary[reference] for reference in reduced] == [items[reference] for reference in references]
    assert used.tolist() == sorted(set(references))
    assert len(dictionary) == len(used)


def test_a_token_filter_sees_positions_in_the_full_dictionary():
    seen = []

    def keep_last(positions: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append((positions.tolist(), offsets.tolist()))
        return positions[offsets[1:] - 1], np.arange(len(offsets))

    tokens, offsets = np.array([5, 6, 7, 8, 9], np.int32), np.array([0, 2, 3, 5])
    references, kept, borders, used = compact(np.array([2, 0, 2]), tokens, offsets, keep_last)
    assert seen == [([0, 1, 3, 4], [0, 2, 4])]
    assert (references.tolist(), kept.tolist(), borders.tolist()) == ([1, 0, 1], [6, 9], [0, 1, 2])
    assert used.tolist() == [0, 2]


def user_batch(step: int) -> UserBatch:
    arrays = {name: np.arange(n + step, dtype=np.int32) for n, name in enumerate(ARRAYS, 1)}
    return UserBatch(**{**arrays, "user_keys": np.array([-(2**63), 2**63 - 1, 0])}, step=step)


def test_every_array_of_a_batch_is_dealt():
    assert sorted([*ARRAYS, "step"]) == sorted(field.name for field in fields(UserBatch))


@pytest.mark.parametrize("step", [0, 3])
def test_a_batch_passes_through_arrow_unchanged(step: int):
    batch = user_batch(step)
    table = to_table(batch)
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        stored = sink.getvalue()
    for received in (table, pa.ipc.open_stream(stored).read_all()):
        again = from_table(received)
        assert again.step == step
        for name in ARRAYS:
            before, after = getattr(batch, name), getattr(again, name)
            assert before.dtype == after.dtype
            assert before.tolist() == after.tolist()


@pytest.mark.parametrize("rows", [0, 2])
def test_merged_blocks_are_refused(rows: int):
    table = pa.concat_tables([to_table(user_batch(1)), to_table(user_batch(1))]).slice(0, rows)
    with pytest.raises(ValueError, match=f"holds {rows} batches instead of 1"):
        from_table(table)
