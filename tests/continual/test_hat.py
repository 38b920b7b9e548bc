"""HAT: formulas against the fixture and loops, and what gated gradients leave as it is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support.continual import DIM, answers, optimize, samples, spec, teach, tiny_method, values
from tests.support.shared_data import shared_path
from userrep.continual.hat import Hat, compensation, free_share, opened_share
from userrep.continual.masks import MAX_SCALE, annealed_scale
from userrep.continual.method import Progress

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def load_fixture() -> dict[str, torch.Tensor]:
    return load_file(shared_path("parity/hat_conure/hat_conure_fixture.safetensors"))


@pytest.mark.parametrize("scale", [1 / MAX_SCALE, 11.1, 50.0])
def test_compensated_gradients_of_the_fixture(scale: float) -> None:
    fixture = load_fixture()
    received = fixture["hat/grad_in"] * compensation(fixture["hat/emb"], scale, MAX_SCALE)
    torch.testing.assert_close(
        received, fixture[f"hat/s{scale:g}{'.0' if scale == 50 else ''}/grad_compensated"], **TOLERANCE
    )


def test_regularisation_of_the_fixture() -> None:
    fixture = load_fixture()
    masks, used = fixture["hat/masks"], fixture["hat/mask_pre"]
    torch.testing.assert_close(opened_share(masks, used), fixture["hat/reg_later_task"][0], **TOLERANCE)
    torch.testing.assert_close(opened_share(masks, 0 * used), fixture["hat/reg_first_task"][0], **TOLERANCE)


def test_gated_gradients_of_the_fixture() -> None:
    fixture = load_fixture()
    used_in, used_out = fixture["hat/mask_pre"][:2]
    grad, expected = (
        fixture[f"hat/{name}"].squeeze(2).transpose(1, 2).flatten(1) for name in ("conv_grad_in", "conv_grad_gated")
    )
    torch.testing.assert_close(grad * free_share(grad, used_out, used_in), expected, **TOLERANCE)
    bias = torch.ones(len(used_out), dtype=torch.float64)
    torch.testing.assert_close(free_share(bias, used_out, None), fixture["hat/bias_gate"], **TOLERANCE)


@given(e=st.floats(-6, 6), scale=st.floats(1 / MAX_SCALE, MAX_SCALE))
def test_a_compensated_gradient_does_not_depend_on_the_scale(e: float, scale: float) -> None:
    if abs(scale * e) > 45:  # where the argument is clipped
        return
    embedding = torch.tensor([e], dtype=torch.float64, requires_grad=True)
    [grad] = torch.autograd.grad(torch.sigmoid(scale * embedding).sum(), embedding)
    received = (grad * compensation(embedding.detach(), scale, MAX_SCALE)).item()
    plain = 1 / (1 + math.exp(-e))
    # The sigmoid's own rounding near 1 is what the factor magnifies.
    assert received == pytest.approx(MAX_SCALE * plain * (1 - plain), rel=1e-9 + 1e-15 * math.exp(abs(scale * e)))


@settings(deadline=None)
@given(dim=st.integers(1, 4), rows=st.integers(1, 3), taps=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_free_share_is_that_of_loops(dim: int, rows: int, taps: int, seed: int, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = [torch.rand(dim, generator=generator) if data.draw(st.booleans()) else None for _ in range(2)]
    received = free_share(torch.empty(rows * dim, taps * dim), *used)
    vector = free_share(torch.empty(rows * dim), *used)
    out, read = (torch.ones(dim) if side is None else side for side in used)
    for row in range(rows * dim):
        assert vector[row] == 1 - out[row % dim]
        for column in range(taps * dim):
            assert received[row, column] == 1 - min(out[row % dim].item(), read[column % dim].item())


def taught(backbone: str = "nextitnet", kinds: tuple = ("next_item",), **options: object) -> Hat:
    method = tiny_method("hat", backbone, **options)
    for kind in kinds:
        teach(method, kind)
    assert isinstance(method, Hat)
    return method


def test_used_channels_are_the_maximum_of_past_masks() -> None:
    method = taught(kinds=("next_item", "item", "label"))
    masks = [torch.sigmoid(MAX_SCALE * embedding) for embedding in method.embeddings.tasks]
    torch.testing.assert_close(method.used, torch.stack(masks).amax(0), rtol=0, atol=0)


def test_the_loss_is_cross_entropy_plus_weighted_share() -> None:
    method = taught(sparsity_weight=0.4)
    method.begin_task(spec(1, "label"))
    items, labels = samples("label")
    loss, facts = method.loss(items, labels, Progress(1, 4))
    scale = annealed_scale(1, 4)
    masks = torch.sigmoid(scale * method.embeddings.tasks[1])
    logits = method.network.logits(items, 1, lambda point, hidden: hidden * masks[point])
    free = 1 - method.used
    share = sum((masks * free).flatten().tolist()) / sum(free.flatten().tolist())
    expected = torch.nn.functional.cross_entropy(logits, labels).item()
    assert facts["train/task_loss"] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(expected + 0.4 * share, rel=1e-5)


@pytest.mark.parametrize("is_compensated", [True, False])
def test_embedding_gradients_before_a_step(is_compensated: bool) -> None:
    method = taught(compensate=is_compensated)
    method.begin_task(spec(1, "label"))
    progress = Progress(2, 4)
    method.loss(*samples("label"), progress)[0].backward()
    embedding = method.embeddings.tasks[1]
    assert embedding.grad is not None
    before = embedding.grad.clone()
    method.before_step(progress)
    factor = compensation(embedding.detach(), annealed_scale(2, 4), MAX_SCALE) if is_compensated else 1
    torch.testing.assert_close(embedding.grad, before * factor)


def expected_still(method: Hat, used: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the definition, which entries of each parameter may not move; `used` is 0 or 1."""
    still: dict[str, torch.Tensor] = {}
    parameters = dict(method.network.backbone.named_parameters())
    for name, (computes, reads) in method.network.backbone.wiring().items():
        flags = torch.zeros_like(parameters[name], dtype=torch.bool)
        for place in torch.cartesian_prod(*map(torch.arange, flags.shape)).reshape(flags.numel(), -1).tolist():
            out = computes is None or used[computes, place[0] % DIM] == 1
            read = reads is None or len(place) == 1 or used[reads, place[1] % DIM] == 1
            flags[tuple(place)] = out and read
        still[name] = flags
    return still


@pytest.mark.parametrize("backbone", ["nextitnet", "dense"])
def test_what_past_tasks_use_does_not_move_and_the_rest_does(backbone: str) -> None:
    method = taught(backbone)
    used = (torch.rand(method.used.shape, generator=torch.Generator().manual_seed(5)) < 0.5).float()
    method.used.copy_(used)
    method.begin_task(spec(1, "item"))
    # Open masks, so that every free entry has a gradient.
    before = values(method.network.backbone)
    for seed in range(4):
        optimize(method, "item", 3, seed=seed)
    still = expected_still(method, used)
    moved = {name: parameter != before[name] for name, parameter in method.network.backbone.named_parameters()}
    for name, flags in still.items():
        assert not (moved[name] & flags).any(), name
    share = sum(int((moved[name] & ~flags).sum()) for name, flags in still.items()) / sum(
        int((~flags).sum()) for flags in still.values()
    )
    assert share > 0.5  # an entry behind a ReLU that is never open has no gradient
    assert {name for name, flags in still.items() if flags.all()} >= {"item_embedding.weight"}


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam])
def test_what_a_step_changes_is_gated_whatever_the_optimizer(optimizer_class: type[torch.optim.Optimizer]) -> None:
    changes = []
    for gated in (False, True):
        method = taught()
        method.used.copy_(torch.rand(method.used.shape, generator=torch.Generator().manual_seed(6)) * gated)
        method.begin_task(spec(1, "item"))
        parameters = dict(method.network.backbone.named_parameters())
        before = values(method.network.backbone)
        optimizer = optimizer_class(method.parameter_groups(0.01))
        method.loss(*samples("item"), Progress(3, 4))[0].backward()
        method.before_step(Progress(3, 4))
        optimizer.step()
        method.after_step()
        changes.append({name: parameters[name].detach() - before[name] for name in before})
    free, gated_changes = changes
    for name, (computes, reads) in method.network.backbone.wiring().items():
        share = free_share(free[name], *(None if p is None else method.used[p] for p in (computes, reads)))
        torch.testing.assert_close(gated_changes[name], free[name] * share, rtol=1e-4, atol=1e-7)
        assert gated_changes[name].abs().max() > 0 or (computes, reads) == (None, None)


def test_nothing_is_forgotten_where_nothing_is_free() -> None:
    method = taught()
    [before] = answers(method)
    method.used.fill_(1)
    losses = teach(method, "label", num_steps=10)
    assert losses[-1] < losses[0]  # the head and the masks still learn
    assert torch.equal(answers(method)[0], before)


def test_frozen_parameters_are_not_handed_out() -> None:
    method = taught()
    method.begin_task(spec(1, "label"))
    handed = {id(parameter) for parameter in method.trainable()}
    named = {name for name, parameter in method.named_parameters() if id(parameter) not in handed}
    assert named == {
        "embeddings.tasks.0",
        "network.heads.0.weight",
        "network.heads.0.bias",
        "network.backbone.item_embedding.weight",
    }


def test_embeddings_stay_where_the_sigmoid_has_a_gradient() -> None:
    method = taught()
    with torch.no_grad():
        method.embeddings.tasks[0].copy_(torch.linspace(-9, 9, method.used.numel()).view_as(method.used))
    method.after_step()
    assert method.embeddings.tasks[0].aminmax() == (-6, 6)
