"""Packing keeps every position once, for any lengths and chunk sizes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from userrep.models.packing import pack


@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.one_of(st.none(), st.integers(1, 50)))
def test_every_position_once_in_chunks_of_equal_lengths(lengths: list[int], chunk_size: int | None) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    packed = pack(offsets, chunk_size)
    expected = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in packed.order])
    assert np.array_equal(packed.positions, expected)
    assert sorted(packed.order.tolist()) == list(range(len(lengths)))
    sequence = position = 0
    for chunk in packed.chunks:
        assert chunk.sequences.start == sequence
        assert chunk.positions.start == position
        for count, length in chunk.groups.shapes:
            assert [lengths[i] for i in packed.order[sequence : sequence + count]] == [length] * count
            sequence, position = sequence + count, position + count * length
        assert chunk.sequences.stop == sequence
        assert chunk.positions.stop == position
        num_sequences = chunk.sequences.stop - chunk.sequences.start
        assert num_sequences == 1 or position - chunk.positions.start <= (chunk_size or position)
    assert sequence == len(lengths)
    assert position == sum(lengths)


def test_groups_split_and_borders() -> None:
    groups = pack(np.array([0, 2, 3, 5, 9])).chunks[0].groups
    assert groups.shapes == ((1, 1), (2, 2), (1, 4))
    parts = list(groups.split(torch.arange(18.0).view(9, 2)))
    assert [tuple(part.shape) for part in parts] == [(1, 1, 2), (2, 2, 2), (1, 4, 2)]
    assert torch.cat([part.flatten(0, 1) for part in parts]).flatten().tolist() == list(range(18))
    assert groups.borders(torch.device("cpu")).tolist() == [0, 1, 3, 5, 9]


@pytest.mark.gpu
def test_ragged_attention_equals_attention_group_by_group() -> None:
    from userrep.models.layers import Block, can_attend_ragged

    torch.manual_seed(0)
    block = Block(64, 4, 64).cuda().bfloat16()
    torch.nn.init.normal_(block.attention_out.weight, std=0.1)
    packed = pack(np.concatenate(([0], np.cumsum([3, 9, 1, 9, 17, 30]))))
    qkv_PX = torch.randn(69, 192, device="cuda", dtype=torch.bfloat16)
    assert can_attend_ragged(qkv_PX)
    groups = packed.chunks[0].groups
    expected = torch.cat([block._attend(part) for part in groups.split(qkv_PX)])
    torch.testing.assert_close(block._attend_ragged(qkv_PX, groups), expected, rtol=2e-2, atol=2e-2)
