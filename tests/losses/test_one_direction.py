"""InfoNCE in one direction and with a bias of its columns, against fixtures, a float64 oracle and on workers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.losses.test_contrastive import TOLERANCE, assert_close, draw, some_keys
from tests.support.contrastive import info_nce_oracle, one_direction_oracle
from tests.support.distributed import run_ranks
from tests.support.shared_data import shared_path
from userrep.losses.contrastive import info_nce
from userrep.losses.negatives import Negatives

NAMES = ("loss", "anchor", "positive", "log_scale")
FIXTURE = "parity/contrastive/contrastive_fixture.safetensors"


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(zip(NAMES, (loss.detach(), *torch.autograd.grad(loss, leaves)), strict=True))


def leaves_of(inputs: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    return tuple(value.to(dtype).detach().clone().requires_grad_() for value in inputs[:3])


def some_bias(size: int, spread: float = 9.0) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * spread + 3


def expected_of(
    size: int, scale: float, bias: torch.Tensor | None, is_symmetric: bool = False
) -> dict[str, torch.Tensor]:
    keys, groups = some_keys(size)
    leaves = leaves_of(draw(size, scale))
    column_bias = torch.zeros(size).double() if bias is None else bias
    loss = one_direction_oracle(*leaves, column_bias, keys, groups)
    if is_symmetric:  # the other direction is what the symmetric loss has beside the unbiased one
        unbiased = one_direction_oracle(*leaves, torch.zeros(size).double(), keys, groups)
        loss = loss / 2 + info_nce_oracle(*leaves, torch.zeros(()), keys, groups) - unbiased / 2
    return gradients(loss, *leaves)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("size", "scale"), [(1, 5.0), (8, 1 / 0.07), (37, 59.0), (37, 100.0), (701, 1 / 0.07)])
@pytest.mark.parametrize("spread", [None, 9.0, 60.0])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_equals_the_whole_matrix(
    dtype: torch.dtype, size: int, scale: float, spread: float | None, is_symmetric: bool
) -> None:
    keys, groups = some_keys(size)
    bias = None if spread is None else some_bias(size, spread)
    expected = expected_of(size, scale, bias, is_symmetric)
    leaves = leaves_of(draw(size, scale), dtype)
    loss = info_nce(
        *leaves, Negatives.gather(keys, groups), tile_size=100, is_symmetric=is_symmetric, column_bias_B=bias
    )
    actual = gradients(loss, *leaves)
    for name in NAMES:
        assert actual[name].dtype == dtype
        # A batch of one has the loss 0, and float32 does not tell a gradient of 1e-9 from 0.
        error = (actual[name].double() - expected[name]).abs().max()
        assert error <= TOLERANCE[dtype] * max(float(expected[name].abs().max()), 1e-2), name


def _rank_gradients(rank: int, rows: tuple[int, ...]) -> list[Any]:
    keys, groups = some_keys(sum(rows))
    mine, results = slice(sum(rows[:rank]), sum(rows[: rank + 1])), []
    for bias in (None, some_bias(sum(rows))):
        anchor, positive, log_scale = draw(sum(rows), 20.0)[:3]
        leaves = leaves_of((anchor[mine], positive[mine], log_scale))
        negatives = Negatives.gather(tuple(key[mine] for key in keys), groups[mine])
        part = None if bias is None else bias[mine]
        loss = info_nce(*leaves, negatives, tile_size=100, is_symmetric=False, column_bias_B=part)
        results.append(gradients(loss, *leaves))
    return results


@pytest.mark.parametrize("rows", [(4, 3), (1, 130)])
def test_workers_give_the_gradient_of_the_global_batch(rows: tuple[int, ...]) -> None:
    by_rank = run_ranks(_rank_gradients, len(rows), rows)
    for bias, *parts in zip((None, some_bias(sum(rows))), *by_rank, strict=True):
        expected = expected_of(sum(rows), 20.0, bias)
        merged = {name: torch.stack([part[name] for part in parts]).mean(0) for name in ("loss", "log_scale")}
        merged |= {name: torch.cat([part[name] for part in parts]) / len(rows) for name in ("anchor", "positive")}
        for name in NAMES:
            assert_close(merged[name], expected[name], 1e-10)


def test_a_bias_has_no_gradient_and_a_common_part_of_it_no_influence() -> None:
    keys, groups = some_keys(20)
    bias, results = some_bias(20).requires_grad_(), []
    for shift in (0.0, 250.0):
        leaves = leaves_of(draw(20, 10.0))
        loss = info_nce(*leaves, Negatives.gather(keys, groups), is_symmetric=False, column_bias_B=bias + shift)
        assert torch.autograd.grad(loss, bias, retain_graph=True, allow_unused=True) == (None,)
        results.append(gradients(loss, *leaves))
    for name in NAMES:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bias", [[1.0, 2.0], [1.0, 2.0, torch.inf], [1.0, 2.0, torch.nan], [0.0, 0.0, 501.0]])
def test_a_bias_that_cannot_be_is_refused(bias: list[float]) -> None:
    leaves, negatives = leaves_of(draw(3, 10.0)), Negatives.gather((torch.arange(3),))
    with pytest.raises(ValueError, match="column bias"):
        info_nce(*leaves, negatives, column_bias_B=torch.tensor(bias))


def log_scale_of(temperature: float) -> torch.Tensor:
    return torch.tensor(1 / temperature, dtype=torch.float64).log()


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_matches_the_fixture_of_the_self_supervised_loss(temperature: float) -> None:
    values = load_file(shared_path(FIXTURE))
    z1, z2 = (values[f"ssl/{name}"].requires_grad_() for name in ("z1", "z2"))
    negatives = Negatives.gather((torch.arange(len(z1)),))
    anchor, positive = F.normalize(z1, dim=-1), F.normalize(z2, dim=-1)
    loss = info_nce(anchor, positive, log_scale_of(temperature), negatives, tile_size=5, is_symmetric=False)
    grads = torch.autograd.grad(loss, (z1, z2))
    for actual, name in zip((loss, *grads), ("L_self", "grad_z1", "grad_z2"), strict=True):
        assert (actual - values[f"ssl/tau{temperature}/{name}"]).abs().max() <= 1e-10, name


@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("variant", ["plain", "logq", "logq_mask_accidental"])
def test_matches_the_fixture_of_the_corrected_loss(temperature: float, variant: str) -> None:
    values = load_file(shared_path(FIXTURE))
    queries, items = (values[f"logq/{name}"].requires_grad_() for name in ("q", "items"))
    keys = values["logq/item_ids"] if variant == "logq_mask_accidental" else torch.arange(len(items))
    bias = None if variant == "plain" else -values["logq/p"].log()
    anchor, positive = F.normalize(queries, dim=-1), F.normalize(items, dim=-1)
    negatives, log_scale = Negatives.gather((keys,)), log_scale_of(temperature)
    loss = info_nce(anchor, positive, log_scale, negatives, tile_size=5, is_symmetric=False, column_bias_B=bias)
    grads = torch.autograd.grad(loss, (queries, items))
    for actual, name in zip((loss, *grads), ("loss", "grad_q", "grad_items"), strict=True):
        expected = values[f"logq/tau{temperature}/{variant}/{name}"]
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max())), name
