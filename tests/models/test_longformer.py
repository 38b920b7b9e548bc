"""Attention in a band over packed sequences, against each sequence alone with the whole matrix written out."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pretrained import shake
from userrep.models.band_attention import lay_out
from userrep.models.longformer import LongformerLayer
from userrep.models.packing import Groups

DIM, HEADS, MLP = 6, 2, 9
CPU = torch.device("cpu")
ragged = st.lists(st.integers(1, 45), min_size=1, max_size=5)


def make(window: int | None, seed: int = 0) -> LongformerLayer:
    torch.manual_seed(seed)
    layer = LongformerLayer(DIM, HEADS, MLP, window, 1e-5).double()
    shake(layer, seed)
    return layer


def group(lengths: list[int]) -> Groups:
    return Groups(tuple((len(list(same)), length) for length, same in itertools.groupby(sorted(lengths))))


def alone(layer: LongformerLayer, window: int | None, x_LD: torch.Tensor) -> torch.Tensor:
    """One sequence."""
    query, key, value = layer.query_key_value(x_LD).chunk(3, dim=1)
    place = torch.arange(len(x_LD))
    is_seen = torch.ones(len(x_LD), len(x_LD), dtype=torch.bool)
    if window is not None:
        is_seen = (place[:, None] - place).abs() <= window // 2
        is_seen[:, 0] = True
    heads = []
    for part in torch.arange(DIM).chunk(HEADS):
        score_LL = (query[:, part] @ key[:, part].T / len(part) ** 0.5).masked_fill(~is_seen, -torch.inf)
        out_Ld = score_LL.softmax(1) @ value[:, part]
        if window is not None:
            score_L = layer.query_global(x_LD[:1])[:, part] @ layer.key_global(x_LD)[:, part].T / len(part) ** 0.5
            out_Ld = torch.cat([score_L.softmax(1) @ layer.value_global(x_LD)[:, part], out_Ld[1:]])
        heads.append(out_Ld)
    x_LD = layer.attention_norm(x_LD + layer.attention_out(torch.cat(heads, dim=1)))
    return layer.mlp_norm(x_LD + layer.mlp_out(torch.nn.functional.gelu(layer.mlp_in(x_LD))))


@settings(deadline=None, max_examples=40)
@given(ragged, st.sampled_from([2, 8, 40, 64, 200, None]), st.integers(0, 99))
def test_values_and_gradients_are_those_of_every_sequence_alone(
    lengths: list[int], window: int | None, seed: int
) -> None:
    layer, groups = make(window, seed), group(lengths)
    x_PD = torch.randn(sum(lengths), DIM, dtype=torch.float64, requires_grad=True)
    expected = torch.cat([alone(layer, window, part) for part in x_PD.split(sorted(lengths))])
    received = layer(x_PD, lay_out(groups, window, CPU))
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-11)
    weights, leaves = torch.randn_like(expected), [x_PD, *layer.parameters()]
    mine, theirs = (torch.autograd.grad((out * weights).sum(), leaves) for out in (received, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("window", [8, None])
def test_rows_that_are_asked_for_are_those_of_all_rows(window: int | None) -> None:
    layer, lengths = make(window), [3, 3, 20, 41]
    layout = lay_out(group(lengths), window, CPU)
    x_PD = torch.randn(sum(lengths), DIM, dtype=torch.float64)
    whole = layer(x_PD, layout)
    torch.testing.assert_close(layer.forward_first(x_PD, layout), whole[[0, 3, 6, 26]], rtol=0, atol=1e-12)
    rows = torch.tensor([66, 1, 7, 40])
    torch.testing.assert_close(layer.forward_rows(x_PD, layout, rows), whole[rows], rtol=0, atol=1e-12)
    assert len(layer.forward_rows(x_PD, layout, rows[:0])) == 0


def test_no_more_than_a_block_and_its_band_is_compared() -> None:
    shapes: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                shapes.append(out.shape)
            return out

    layer, length, window = make(64), 2048, 64
    x_PD, layout = torch.randn(length, DIM, dtype=torch.float64), lay_out(group([length]), window, CPU)
    with Watch(), torch.no_grad():
        layer(x_PD, layout)
    largest = max(shape.numel() for shape in shapes)
    assert largest < 2 * (window + 1) * HEADS * length
