"""The user encoder over a table of items, against a loop over histories, each alone, with attention written out."""

import itertools
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.pretrained import shake
from userrep.models.clue import Clue, ClueConfig
from userrep.models.clue_backbone import ClueBackbone
from userrep.models.layers import Block
from userrep.models.packing import pack

DIM, NUM_ITEMS, LENGTH = 6, 11, 7
ragged = st.lists(st.integers(1, LENGTH), min_size=1, max_size=9)


def make_model(num_layers: int = 2, seed: int = 0) -> ClueBackbone:
    torch.manual_seed(seed)
    config = ClueConfig(dim=DIM, num_heads=2, service_layers=num_layers, mlp_ratio=2)
    item_VD = torch.cat([torch.zeros(1, DIM), torch.randn(NUM_ITEMS - 1, DIM)])
    model = ClueBackbone(config, item_VD).double()
    shake(model, seed)
    return model


def histories(lengths: list[int], seed: int = 0) -> torch.Tensor:
    items = torch.randint(1, NUM_ITEMS, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        items[row, : LENGTH - length] = 0
    return items


def encode_alone(model: ClueBackbone, history: list[int], masks_KD: torch.Tensor) -> torch.Tensor:
    """User vector (D,) of one history; a mask is on what a branch adds."""
    encoder, masks = model.user_encoder, iter(masks_KD)
    x_LD = torch.stack([model.get_buffer("item_VD")[item] for item in history])
    for module in encoder.service_transformer.blocks:
        block = cast(Block, module)
        query_LD, key_LD, value_LD = block.query_key_value(block.attention_norm(x_LD)).chunk(3, dim=1)
        heads = []
        for part in torch.arange(DIM).chunk(block.num_heads):
            weights_LL = torch.softmax(query_LD[:, part] @ key_LD[:, part].T / len(part) ** 0.5, dim=1)
            heads.append(weights_LL @ value_LD[:, part])
        x_LD = x_LD + next(masks) * block.attention_out(torch.cat(heads, dim=1))
        x_LD = x_LD + next(masks) * block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x_LD))))
    pooled_D = x_LD.mean(dim=0)
    return pooled_D + next(masks) * encoder.head_out(F.gelu(encoder.head_in(encoder.head_norm(pooled_D))))


def encode_each(model: ClueBackbone, items_BL: torch.Tensor, masks_KD: torch.Tensor) -> torch.Tensor:
    return torch.stack([encode_alone(model, [item for item in row if item], masks_KD) for row in items_BL.tolist()])


@settings(deadline=None, max_examples=15)
@given(lengths=ragged, num_layers=st.integers(0, 2), seed=st.integers(0, 2**31))
def test_values_and_gradients_are_those_of_every_history_alone(lengths: list[int], num_layers: int, seed: int) -> None:
    model, items = make_model(num_layers, seed), histories(lengths, seed)
    masks = torch.rand(model.num_points, DIM, dtype=torch.float64, requires_grad=True)
    expected = encode_each(model, items, masks)
    received = model(items, lambda point, added: added * masks[point])
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    leaves = [*model.parameters(), masks]
    # Query and key of histories of one item have no influence.
    mine, theirs = (
        torch.autograd.grad((vectors * weights).sum(), leaves, materialize_grads=True)
        for vectors in (received, expected)
    )
    for own, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-10)


def test_all_lengths_at_once_in_any_order_of_rows() -> None:
    model = make_model()
    for lengths in ([5, 1, 7, 3, 2, 6, 4], [4, 4, 4], [1, 1], [7, 1, 7, 1], [3]):
        items = histories(lengths)
        ones = torch.ones(model.num_points, DIM, dtype=torch.float64)
        torch.testing.assert_close(model(items), encode_each(model, items, ones), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(lengths=ragged, seed=st.integers(0, 2**31))
def test_vectors_are_those_that_the_encoder_was_pretrained_with(lengths: list[int], seed: int) -> None:
    model, items = make_model(1, seed), histories(lengths, seed)
    clue = Clue(ClueConfig(dim=DIM, num_heads=2, mlp_ratio=2), vocab_size=1).double()
    clue.user_encoder.load_state_dict(model.user_encoder.state_dict())
    flat, packed = items[items != 0], pack(np.cumsum([0, *lengths]))
    references = flat[torch.from_numpy(packed.positions)]
    expected = clue.encode_histories(model.get_buffer("item_VD"), references, packed.chunks[0].groups)
    received = F.normalize(model(items), dim=-1)
    torch.testing.assert_close(received[torch.from_numpy(packed.order)], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_mask_points_are_met_in_their_order(num_layers: int) -> None:
    model, items = make_model(num_layers), histories([3, 1, 7])
    met = []

    def note(point: int, added: torch.Tensor) -> torch.Tensor:
        met.append((point, tuple(added.shape)))
        return added

    received = model(items, note)
    assert model.num_points == 2 * num_layers + 1
    assert met == [*((point, (3 + 1 + 7, DIM)) for point in range(2 * num_layers)), (2 * num_layers, (3, DIM))]
    assert torch.equal(received, model(items))


def test_wiring_names_every_parameter_and_is_true() -> None:
    """What computes a mask point, channel by channel, has no gradient where it is closed; everything else has."""
    model, items = make_model(), histories([6, 2, 7])
    wiring = model.wiring()
    parameters = dict(model.named_parameters())
    assert wiring.keys() == parameters.keys()
    assert all(reads is None for _, reads in wiring.values())
    assert [out for out, _ in wiring.values() if out is not None] == sorted([*range(model.num_points)] * 2)
    for point, channel in itertools.product(range(model.num_points), range(DIM)):
        masks = torch.ones(model.num_points, DIM, dtype=torch.float64)
        masks[point, channel] = 0
        vectors = model(items, lambda p, added, masks=masks: added * masks[p])
        grads = torch.autograd.grad((vectors * torch.randn_like(vectors)).sum(), list(parameters.values()))
        for (name, (out, _)), grad in zip(wiring.items(), grads, strict=True):
            is_closed = torch.zeros(len(grad), dtype=torch.bool)
            if out == point:
                is_closed[channel] = True
            assert not grad[is_closed].any(), name
            if not name.endswith("query_key_value.bias"):  # that of a key has no influence on attention
                assert grad[~is_closed].flatten(1).any(dim=1).all() if grad.ndim > 1 else grad[~is_closed].all(), name


def test_a_closed_point_takes_all_of_its_parameters_out() -> None:
    model, items = make_model(), histories([6, 2, 7])
    parameters = dict(model.named_parameters())
    for point in range(model.num_points):
        vectors = model(items, lambda p, added, point=point: added * float(p != point))
        grads = torch.autograd.grad(vectors.square().sum(), list(parameters.values()))
        for name, grad in zip(parameters, grads, strict=True):
            assert not (model.wiring()[name][0] == point and grad.any()), name


def test_item_vectors_are_no_parameters_and_are_not_saved() -> None:
    torch.manual_seed(0)
    item_VD = torch.randn(NUM_ITEMS, DIM)
    model = ClueBackbone(ClueConfig(dim=DIM, num_heads=2), item_VD)
    assert all("item_VD" not in names for names in (model.state_dict(), dict(model.named_parameters())))
    assert all(name.startswith("user_encoder.") for name in model.state_dict())
    assert model.double().get_buffer("item_VD").dtype == torch.float64  # but they go where the module goes


def test_a_new_backbone_is_the_mean_of_its_items() -> None:
    torch.manual_seed(0)
    item_VD, items = torch.randn(NUM_ITEMS, DIM), histories([2, 7])
    model = ClueBackbone(ClueConfig(dim=DIM, num_heads=2), item_VD)
    expected = [item_VD[row[row != 0]].mean(dim=0) for row in items]
    torch.testing.assert_close(model(items), torch.stack(expected))


def test_it_has_no_vectors_of_prefixes() -> None:
    with pytest.raises(ValueError, match="cannot be taught a next_item task"):
        make_model()(histories([3]), last_only=False)
