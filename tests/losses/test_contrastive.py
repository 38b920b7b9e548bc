"""The loss against the fixtures of official formulas, a naive reference, and itself on several workers."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.distributed import run_ranks
from userrep.losses.contrastive import clip_loss

FIXTURE = Path(__file__).parents[3] / "shared/parity/contrastive/contrastive_fixture.safetensors"
TEMPERATURES = (0.01, 0.05, 0.07, 0.2, 1.0)


def fixture() -> dict[str, torch.Tensor]:
    if not FIXTURE.is_file():
        pytest.skip(f"the numeric fixtures are not here ({FIXTURE.parent})")
    return load_file(FIXTURE)


def loss_of(raw_x: torch.Tensor, raw_y: torch.Tensor, log_scale: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return clip_loss(F.normalize(raw_x, dim=-1), F.normalize(raw_y, dim=-1), log_scale, keys)


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_matches_fixture(batch: int, temperature: float) -> None:
    values = fixture()
    name = f"clip/B{batch}/tau{temperature}"
    x, y = values[f"clip/B{batch}/x"].requires_grad_(), values[f"clip/B{batch}/y"].requires_grad_()
    log_scale = torch.tensor(1 / temperature, dtype=torch.float64).log().requires_grad_()
    loss = loss_of(x, y, log_scale, torch.arange(batch))
    loss.backward()
    for actual, key in ((loss, "loss"), (x.grad, "grad_x"), (y.grad, "grad_y")):
        expected = values[f"{name}/{key}"]
        assert actual is not None
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))
    if temperature > 0.01:  # at the clip itself the scale has no gradient
        assert log_scale.grad is not None
        assert abs(float(log_scale.grad - values[f"{name}/grad_log_scale"])) <= 1e-10


def _rank_gradients(
    rank: int, x: torch.Tensor, y: torch.Tensor, keys: torch.Tensor, world_size: int
) -> dict[str, torch.Tensor]:
    mine = slice(rank * len(x) // world_size, (rank + 1) * len(x) // world_size)
    x_mine, y_mine = x[mine].clone().requires_grad_(), y[mine].clone().requires_grad_()
    log_scale = torch.tensor(2.0, dtype=x.dtype).requires_grad_()
    loss = loss_of(x_mine, y_mine, log_scale, keys[mine])
    loss.backward()
    assert x_mine.grad is not None
    assert y_mine.grad is not None
    assert log_scale.grad is not None
    return {"loss": loss.detach(), "x": x_mine.grad, "y": y_mine.grad, "scale": log_scale.grad}


@pytest.mark.parametrize("world_size", [2, 4])
def test_workers_give_the_gradient_of_the_global_batch(world_size: int) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, 5, dtype=torch.float64)
    keys = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 8, 9, 0, 0])  # equal users on different workers
    whole = _rank_gradients(0, x, y, keys, 1)
    parts = run_ranks(_rank_gradients, world_size, x, y, keys, world_size)
    # Data parallelism averages gradients over ranks; a rank's input rows get their gradient from that rank alone.
    torch.testing.assert_close(torch.stack([part["loss"] for part in parts]).mean(), whole["loss"], rtol=1e-12, atol=0)
    for name in ("x", "y"):
        merged = torch.cat([part[name] for part in parts]) / world_size
        torch.testing.assert_close(merged, whole[name], rtol=1e-10, atol=1e-14)
    scale = torch.stack([part["scale"] for part in parts]).mean()
    torch.testing.assert_close(scale, whole["scale"], rtol=1e-10, atol=1e-14)


def test_same_user_is_no_negative() -> None:
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(5, 3).double(), dim=-1), F.normalize(torch.randn(5, 3).double(), dim=-1)
    keys = [7, 8, 7, 9, 7]
    total = 0.0
    for a, b in ((x, y), (y, x)):
        for i in range(5):
            logits = {j: float(3 * a[i] @ b[j]) for j in range(5) if j == i or keys[j] != keys[i]}
            total += torch.logsumexp(torch.tensor(list(logits.values()), dtype=torch.float64), 0).item() - logits[i]
    actual = clip_loss(x, y, torch.tensor(3.0, dtype=torch.float64).log(), torch.tensor(keys))
    assert actual.item() == pytest.approx(total / 10, rel=1e-12)


def test_uninformative_views_cost_log_of_the_batch() -> None:
    rows = torch.ones(40, 4) / 2
    loss = clip_loss(rows, rows, torch.tensor(3.0), torch.arange(40))
    assert loss.item() == pytest.approx(torch.tensor(40.0).log().item(), rel=1e-6)


def test_huge_logit_scale_stays_finite() -> None:
    rows = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1).requires_grad_()
    scale = torch.tensor(80.0, requires_grad=True)
    loss = clip_loss(rows, rows.flip(0), scale, torch.arange(6))
    loss.backward()
    assert torch.isfinite(loss)
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()
