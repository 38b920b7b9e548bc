"""Cross-entropy in chunks against autograd over all logits."""

import pytest
import torch
import torch.nn.functional as F

from userrep.losses import masked_lm
from userrep.losses.masked_lm import linear_cross_entropy


def inputs(num_rows: int, dtype: torch.dtype = torch.float64) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((num_rows, 5), (23, 5), (23,))]
    return leaves, torch.randint(0, 23, (num_rows,)), torch.rand(num_rows, dtype=dtype)


def oracle(leaves: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    feature, matrix, bias = leaves
    return F.cross_entropy(feature @ matrix.T + bias, labels, reduction="none")


@pytest.mark.parametrize("num_rows", [0, 1, 7, 16])
@pytest.mark.parametrize("chunk_bytes", [1, 4 * 23 * 3, 2**20])
def test_values_and_gradients_are_those_of_all_logits(
    num_rows: int, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_lm, "CHUNK_BYTES", chunk_bytes)
    leaves, labels, weights = inputs(num_rows)
    loss, loss_M = linear_cross_entropy(*leaves, labels, weights)
    expected_M = oracle(leaves, labels)
    torch.testing.assert_close(loss_M, expected_M.detach(), rtol=0, atol=1e-12)
    mine = torch.autograd.grad(3 * loss, leaves)
    theirs = torch.autograd.grad(3 * (weights * expected_M).sum(), leaves)
    torch.testing.assert_close(loss, (weights * expected_M).sum(), rtol=0, atol=1e-12)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_products_are_of_autocasts_precision_and_everything_else_is_not() -> None:
    leaves, labels, weights = inputs(40, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, loss_M = linear_cross_entropy(*leaves, labels, weights)
    expected = (weights * oracle(leaves, labels)).sum()
    assert loss.dtype == loss_M.dtype == torch.float32
    assert loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for one, other in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, rtol=0, atol=0.03 * other.abs().max().item())


def test_a_constant_matrix_costs_no_gradient_and_changes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masked_lm, "CHUNK_BYTES", 4 * 23 * 3)
    leaves, labels, weights = inputs(7)
    loss, _ = linear_cross_entropy(leaves[0], leaves[1].detach(), leaves[2], labels, weights)
    mine = torch.autograd.grad(loss, leaves, allow_unused=True)
    theirs = torch.autograd.grad((weights * oracle(leaves, labels)).sum(), leaves)
    assert mine[1] is None
    for place in (0, 2):
        torch.testing.assert_close(mine[place], theirs[place], rtol=0, atol=1e-12)


def test_without_a_graph_there_are_values_alone() -> None:
    leaves, labels, weights = inputs(4)
    with torch.no_grad():
        loss, _ = linear_cross_entropy(*leaves, labels, weights)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx((weights * oracle(leaves, labels)).sum().item())
