"""Spread-out regularisation against fixtures, a matrix of all pairs, and on two workers."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.distributed import run_ranks
from tests.support.shared_data import shared_path
from userrep.losses.negatives import Negatives
from userrep.losses.spread_out import global_orthogonal, spread_out_softmax

FIXTURE = "parity/contrastive/contrastive_fixture.safetensors"
LOG_SCALE = torch.tensor(2.0, dtype=torch.float64)


def draw(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return F.normalize(torch.randn(size, 5, generator=generator, dtype=torch.float64) + 0.5, dim=-1)


def naive_orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    pairs = (vectors @ vectors.T)[~torch.eye(len(vectors), dtype=torch.bool)]
    return pairs.mean() ** 2 + F.relu(pairs.square().mean() - 1 / vectors.shape[1])


def naive_softmax(vectors: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(LOG_SCALE.exp() * vectors @ vectors.T, torch.arange(len(vectors)))


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0])
def test_softmax_matches_fixture(temperature: float) -> None:
    values = load_file(shared_path(FIXTURE))
    z = values["ssl/z1"].requires_grad_()
    log_scale = torch.tensor(1 / temperature, dtype=torch.float64).log()
    loss = spread_out_softmax(F.normalize(z, dim=-1), log_scale, Negatives.gather((torch.arange(len(z)),)), 5)
    (grad,) = torch.autograd.grad(loss, z)
    for actual, name in ((loss, "spreadout_softmax"), (grad, "spreadout_softmax_grad")):
        assert (actual - values[f"ssl/tau{temperature}/{name}"]).abs().max() <= 1e-10


@pytest.mark.parametrize(("given", "name"), [("z1", "gor"), ("z1_collapsed", "gor_collapsed")])
def test_orthogonal_matches_fixture(given: str, name: str) -> None:
    values = load_file(shared_path(FIXTURE))
    z = values[f"ssl/{given}"].requires_grad_()
    loss = global_orthogonal(F.normalize(z, dim=-1), (len(z),))
    (grad,) = torch.autograd.grad(loss, z)
    assert (loss - values[f"ssl/{name}"]).abs().max() <= 1e-10
    assert (grad - values[f"ssl/{name}_grad"]).abs().max() <= 1e-10


def losses_of(vectors: torch.Tensor, keys: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    results, negatives = [], Negatives.gather((keys,))
    for is_softmax in (True, False):
        leaf = vectors.clone().requires_grad_()
        if is_softmax:
            loss = spread_out_softmax(leaf, LOG_SCALE, negatives, 4)
        else:
            loss = global_orthogonal(leaf, negatives.sizes)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    return results


def _on_rank(rank: int, rows: tuple[int, ...]) -> Any:
    mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    return losses_of(draw(sum(rows))[mine], torch.arange(sum(rows))[mine])


def test_workers_give_the_gradient_of_the_global_batch() -> None:
    rows = (4, 7)
    parts = run_ranks(_on_rank, 2, rows)
    for number, naive in enumerate((naive_softmax, naive_orthogonal)):
        leaf = draw(sum(rows)).requires_grad_()
        expected = naive(leaf)
        (grad,) = torch.autograd.grad(expected, leaf)
        loss = torch.stack([part[number][0] for part in parts]).mean()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.cat([part[number][1] for part in parts]) / 2, grad, rtol=1e-10, atol=1e-13)


def test_an_item_that_was_drawn_twice_is_not_pushed_from_itself() -> None:
    vectors = draw(6)[[0, 1, 1]]
    masked, unmasked = (float(losses_of(vectors, torch.tensor(keys))[0][0]) for keys in ([4, 5, 5], [4, 5, 6]))
    assert unmasked > 2 / 3 * math.log(2)  # two of three cannot tell themselves from their copy
    assert masked < 0.01


def test_one_vector_costs_nothing() -> None:
    assert global_orthogonal(draw(1), (1,)) == 0
