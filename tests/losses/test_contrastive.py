"""The losses against the fixtures of official formulas, against float64 oracles, and on several workers."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.contrastive import info_nce_oracle, sigmoid_oracle
from tests.support.distributed import run_ranks
from userrep.losses.contrastive import MAX_LOGIT_SCALE, info_nce, sigmoid_loss
from userrep.losses.negatives import Negatives

FIXTURE = Path(__file__).parents[3] / "shared/parity/contrastive/contrastive_fixture.safetensors"
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
ORACLES: dict[str, Callable[..., torch.Tensor]] = {"info_nce": info_nce_oracle, "sigmoid": sigmoid_oracle}
NAMES = ("loss", "anchor", "positive", "log_scale", "bias")


def gradients(loss: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and its gradients with respect to every input."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    value = loss(*leaves)
    value.backward()
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return dict(zip(NAMES, [value.detach(), *grads], strict=True))


def tiled(
    form: str, keys: tuple[torch.Tensor, ...], groups: torch.Tensor | None, tile_size: int
) -> Callable[..., torch.Tensor]:
    def loss(anchor: torch.Tensor, positive: torch.Tensor, log_scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        negatives = Negatives.gather(keys, groups)
        if form == "info_nce":
            return info_nce(anchor, positive, log_scale, negatives, tile_size)
        return sigmoid_loss(anchor, positive, log_scale, bias, negatives, tile_size)

    return loss


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Largest deviation relative to the largest entry."""
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def draw(size: int, scale: float, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Random normalised views of hardly similar users, the log of the scale, and a bias; float64."""
    generator = torch.Generator().manual_seed(seed)
    anchor = F.normalize(torch.randn(size, 24, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(size, 24, generator=generator, dtype=torch.float64)
    positive = F.normalize(anchor + 0.6 * noise, dim=-1)
    return anchor, positive, torch.tensor(scale, dtype=torch.float64).log(), torch.tensor(-3.0, dtype=torch.float64)


def some_keys(size: int) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """User keys and item keys of which some are equal, and three groups of unequal sizes."""
    generator = torch.Generator().manual_seed(size)
    users = torch.randint(0, 2 * size, (size,), generator=generator)
    items = torch.randint(0, 4 * size, (size,), generator=generator)
    groups = torch.tensor([7, 7, 7, 2, 9])[torch.randint(0, 5, (size,), generator=generator)]
    return (users, items), groups


@pytest.mark.parametrize("batch", [8, 64])
@pytest.mark.parametrize("temperature", [0.01, 0.05, 0.07, 0.2, 1.0])
def test_matches_fixture(batch: int, temperature: float) -> None:
    if not FIXTURE.is_file():
        pytest.skip(f"the numeric fixtures are not here ({FIXTURE.parent})")
    values = load_file(FIXTURE)
    x, y = (values[f"clip/B{batch}/{name}"].requires_grad_() for name in "xy")
    log_scale = torch.tensor(1 / temperature, dtype=torch.float64).log().requires_grad_()
    negatives = Negatives.gather((torch.arange(batch),))
    loss = info_nce(F.normalize(x, dim=-1), F.normalize(y, dim=-1), log_scale, negatives, tile_size=5)
    loss.backward()
    for actual, key in ((loss, "loss"), (x.grad, "grad_x"), (y.grad, "grad_y"), (log_scale.grad, "grad_log_scale")):
        expected = values[f"clip/B{batch}/tau{temperature}/{key}"]
        assert actual is not None
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max())), key


@pytest.mark.parametrize("form", ORACLES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("size", "scale"), [*product([8, 37, 256, 1000], [1e-3, 1 / 0.07, 59.0, 61.0, 100.0]), (4096, 1 / 0.07)]
)
def test_equals_the_whole_matrix(form: str, dtype: torch.dtype, size: int, scale: float) -> None:
    keys, groups = some_keys(size)
    inputs = draw(size, scale)
    expected = gradients(lambda *values: ORACLES[form](*values, keys, groups), *inputs)
    actual = gradients(tiled(form, keys, groups, 300), *(value.to(dtype) for value in inputs))
    for name in NAMES:
        assert actual[name].dtype == dtype
        if expected[name].abs().max() > 0:
            assert_close(actual[name], expected[name], TOLERANCE[dtype])


def _rank_gradients(rank: int, cases: list[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[Any]:
    results = []
    for form, dtype, rows in cases:
        keys, groups = some_keys(sum(rows))
        anchor, positive, log_scale, bias = (value.to(dtype) for value in draw(sum(rows), 20.0))
        mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
        loss = tiled(form, tuple(key[mine] for key in keys), groups[mine], 100)
        results.append(gradients(loss, anchor[mine], positive[mine], log_scale, bias))
    return results


ROWS_OF_RANKS = (
    [(4, 4), (182, 182), (2048, 2048), (1, 6)],
    [(3, 4, 3), (1, 8, 1), (121, 121, 122), (700, 1, 300)],
    [(2, 2, 2, 2), (91, 91, 91, 91), (1024, 1024, 1024, 1024)],
)


@pytest.mark.parametrize("rows_of_ranks", ROWS_OF_RANKS, ids=lambda rows: f"{len(rows[0])} workers")
def test_workers_give_the_gradient_of_the_global_batch(rows_of_ranks: list[tuple[int, ...]]) -> None:
    world_size = len(rows_of_ranks[0])
    cases = [(form, dtype, rows) for form in ORACLES for dtype in TOLERANCE for rows in rows_of_ranks]
    by_rank = run_ranks(_rank_gradients, world_size, cases)
    for (form, dtype, rows), *parts in zip(cases, *by_rank, strict=True):
        keys, groups = some_keys(sum(rows))
        expected = gradients(lambda *v, f=form, k=keys, g=groups: ORACLES[f](*v, k, g), *draw(sum(rows), 20.0))
        # Data parallelism averages over ranks; a rank's input rows get their gradient from that rank alone.
        merged = {name: torch.stack([part[name] for part in parts]).mean(0) for name in ("loss", "log_scale", "bias")}
        merged |= {name: torch.cat([part[name] for part in parts]) / world_size for name in ("anchor", "positive")}
        for name in NAMES:
            if expected[name].abs().max() > 0:
                assert_close(merged[name], expected[name], TOLERANCE[dtype])


@pytest.mark.parametrize("form", ORACLES)
def test_tile_size_is_of_no_influence(form: str) -> None:
    keys, groups = some_keys(50)
    inputs = draw(50, 10.0)
    results = [gradients(tiled(form, keys, groups, tile_size), *inputs) for tile_size in (1, 7, 50, 4096)]
    for other in results[1:]:
        for name in NAMES:
            torch.testing.assert_close(other[name], results[0][name], rtol=1e-12, atol=1e-15)


def test_uninformative_views_cost_log_of_the_batch() -> None:
    rows = torch.ones(40, 4) / 2
    loss = info_nce(rows, rows, torch.tensor(3.0), Negatives.gather((torch.arange(40),)))
    assert loss.item() == pytest.approx(math.log(40), rel=1e-6)


@pytest.mark.parametrize("form", ORACLES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("log_scale", [-3e38, -100.0, 0.0, 4.0, 4.2, math.log(100), 5.0, 88.0, 3e38])
def test_any_logit_scale_stays_finite(form: str, dtype: torch.dtype, log_scale: float) -> None:
    rows = torch.eye(6, 5, dtype=dtype)
    rows[5, 0] = 1
    for positive in (rows, -rows, rows.flip(0)):
        inputs = (rows, positive, torch.tensor(log_scale, dtype=dtype), torch.tensor(-10.0, dtype=dtype))
        for keys in (torch.arange(6), torch.zeros(6, dtype=torch.int64)):  # the latter: no negatives at all
            for name, value in gradients(tiled(form, (keys,), None, 4), *inputs).items():
                assert torch.isfinite(value).all(), name


@pytest.mark.parametrize("form", ORACLES)
def test_the_scale_is_clipped_and_the_clip_passes_the_gradient_at_its_edge(form: str) -> None:
    anchor, positive, _, bias = draw(9, 1.0)
    loss = tiled(form, (torch.arange(9),), None, 4)
    edge, above = (
        gradients(loss, anchor, positive, torch.tensor(value, dtype=torch.float64), bias)
        for value in (math.log(MAX_LOGIT_SCALE), 7.0)
    )
    torch.testing.assert_close(above["loss"], edge["loss"], rtol=1e-12, atol=0)
    assert above["log_scale"] == 0
    assert edge["log_scale"] != 0


def test_a_row_without_negatives_costs_nothing() -> None:
    anchor, positive, log_scale, bias = draw(5, 10.0)
    result = gradients(
        tiled("info_nce", (torch.zeros(5, dtype=torch.int64),), None, 2), anchor, -positive, log_scale, bias
    )
    assert result["loss"].abs() <= 1e-12
    assert result["anchor"].abs().max() <= 1e-12


def test_float32_inside_bfloat16_autocast() -> None:
    keys, groups = some_keys(70)
    inputs = [value.float() for value in draw(70, 20.0)]
    expected = gradients(tiled("info_nce", keys, groups, 32), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = gradients(tiled("info_nce", keys, groups, 32), *inputs)
    for name in NAMES:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    halves = gradients(tiled("info_nce", keys, groups, 32), *(value.bfloat16() for value in inputs[:2]), *inputs[2:])
    assert halves["loss"].dtype == torch.float32
    assert halves["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-2)
