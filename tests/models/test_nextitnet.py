"""The planned network against plain padded convolutions, position by position, with gradients."""

import itertools
from typing import cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from userrep.models import nextitnet
from userrep.models.causal import CausalLayer, plan_causal
from userrep.models.nextitnet import LAYER_NORM_EPS, Block, NextItNet, NextItNetConfig

DIM, NUM_ITEMS = 5, 11


def make_model(dilations: tuple[int, ...], seed: int = 0) -> NextItNet:
    torch.manual_seed(seed)
    model = NextItNet(NextItNetConfig(dim=DIM, dilations=dilations), NUM_ITEMS).double()
    for parameter in model.parameters():
        parameter.data.normal_()
    return model


def histories(lengths: list[int], size: int, seed: int = 0) -> torch.Tensor:
    items = torch.randint(1, NUM_ITEMS, (len(lengths), size), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        items[row, : size - length] = 0
    return items


def convolve(model: NextItNet, items_BL: torch.Tensor, masks: torch.Tensor, dilations: tuple[int, ...]) -> torch.Tensor:
    """All positions of all sequences by `conv1d` over zero-padded sequences, (B, L, D)."""
    x_BDL = model.item_embedding(items_BL).transpose(1, 2)
    for number, (module, dilation) in enumerate(zip(model.blocks, dilations, strict=True)):
        block, hidden = cast(Block, module), x_BDL
        for layer, (conv, norm) in enumerate(((block.conv1, block.norm1), (block.conv2, block.norm2))):
            step = dilation * (layer + 1)
            kernel = conv.weight.unflatten(1, (3, DIM)).transpose(1, 2)  # (out, in, tap)
            hidden = F.conv1d(F.pad(hidden, (2 * step, 0)), kernel, conv.bias, dilation=step)
            hidden = F.layer_norm(hidden.transpose(1, 2), (DIM,), norm.weight, norm.bias, LAYER_NORM_EPS)
            hidden = (F.relu(hidden) * masks[2 * number + layer]).transpose(1, 2)
        x_BDL = x_BDL + hidden
    return x_BDL.transpose(1, 2)


@pytest.mark.parametrize("dilations", [(1,), (2, 1), (1, 4, 1, 4)])
@pytest.mark.parametrize("lengths", [[9, 9], [1, 9, 4], [0, 3], [0], [2, 7, 7, 9, 1]])
@pytest.mark.parametrize("last_only", [True, False])
def test_values_and_gradients_are_those_of_padded_convolutions(
    dilations: tuple[int, ...], lengths: list[int], last_only: bool
) -> None:
    model, items = make_model(dilations), histories(lengths, 9)
    masks = torch.rand(2 * len(dilations), DIM, dtype=torch.float64, requires_grad=True)
    expected = convolve(model, items, masks, dilations)
    expected = expected[:, -1] if last_only else expected
    received = model(items, lambda point, hidden: hidden * masks[point], last_only)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-12)
    weights = torch.randn_like(expected)
    leaves = [*model.parameters(), masks]
    for mine, theirs in zip(
        torch.autograd.grad((received * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_what_is_read_twice_under_autocast_is_the_same_both_times() -> None:
    """The backward pass makes anew what a convolution has read, out of a patch of matrix products."""
    model, items = make_model((1, 2)).float(), histories([2, 0, 7, 9], 9)
    patch = torch.nn.Linear(DIM, DIM)

    def keep_all(conv: torch.nn.Linear, x_ND: torch.Tensor, layer: CausalLayer, change=lambda x: x) -> torch.Tensor:
        return conv(nextitnet._read(change(x_ND), layer))

    def gradients() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(items, lambda _, hidden: hidden + patch(hidden), last_only=False)
        return torch.cat([g.flatten() for g in torch.autograd.grad(output.square().sum(), list(model.parameters()))])

    received = gradients()
    with mock.patch.object(nextitnet, "_convolve", side_effect=keep_all):
        expected = gradients()
    assert (received - expected).norm() < 0.01 * expected.norm()


def test_no_adapter_changes_nothing() -> None:
    model, items = make_model((1, 2)), histories([4, 9], 9)
    ones = torch.ones(4, DIM, dtype=torch.float64)
    torch.testing.assert_close(model(items), convolve(model, items, ones, (1, 2))[:, -1])


def test_pads_are_computed_once_and_the_last_position_needs_few() -> None:
    items = histories([2, 5, 100], 100)
    plan = plan_causal(items, (1, 2), last_only=False)
    assert [len(layer.kept) for layer in plan.layers] == [2 + 5 + 100 + 98] * 2
    plan = plan_causal(items, (1, 2), last_only=True)
    # The last position reads those 0, 2 and 4 before it, and they read 0..6 before it; pads among them stand once.
    assert [len(layer.kept) for layer in plan.layers] == [(1 + 3 + 3) + 2, 3]
    assert len(plan.items) == (2 + 5 + 7) + 5


def test_item_zero_inside_a_history_is_no_pad() -> None:
    model, items = make_model((1, 2)), histories([6, 9], 9)
    items[:, 5] = 0
    ones = torch.ones(4, DIM, dtype=torch.float64)
    torch.testing.assert_close(model(items, last_only=False), convolve(model, items, ones, (1, 2)))


def test_wiring_names_every_parameter_and_is_true() -> None:
    """What a parameter computes changes nothing where its mask point is closed."""
    model, items = make_model((1, 2)), histories([6, 9], 9)
    wiring = model.wiring()
    assert wiring.keys() == dict(model.named_parameters()).keys()
    assert {out for out, _ in wiring.values()} == {None, *range(model.num_points)}
    for point, channel in itertools.product(range(model.num_points), range(DIM)):
        mask = torch.ones(model.num_points, DIM, dtype=torch.float64)
        mask[point, channel] = 0
        output = model(items, lambda p, hidden, mask=mask: hidden * mask[p], last_only=False)
        grads = torch.autograd.grad(output.square().sum(), list(model.parameters()))
        for (name, (out, reads)), grad in zip(wiring.items(), grads, strict=True):
            if out == point and grad.ndim == 2:  # the layer norm couples channels, so only what follows it is closed
                continue
            if out == point and name.split(".")[2].startswith("norm"):
                assert grad[channel] == 0, name
            if reads == point:
                assert torch.all(grad.unflatten(1, (3, DIM))[:, :, channel] == 0), name


def test_item_embeddings_can_come_from_elsewhere() -> None:
    vectors = torch.randn(NUM_ITEMS, DIM)
    model = NextItNet(NextItNetConfig(dim=DIM, dilations=(1,)), NUM_ITEMS, vectors)
    assert torch.equal(model.item_embedding.weight, vectors)
