"""CONURE: which weights are chosen, what is trained in which phase, and which weights a task uses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tests.support.continual import BACKBONES, answers, optimize, samples, spec, teach, tiny_method, values
from tests.support.shared_data import shared_path
from userrep.continual.conure import FREE, Conure, choose
from userrep.continual.method import Progress

SPARSITY = 0.7


def test_weights_of_the_fixture() -> None:
    fixture = load_file(shared_path("parity/hat_conure/hat_conure_fixture.safetensors"))
    is_free = torch.ones_like(fixture["conure/T1/weight"], dtype=torch.bool)
    for number in range(3):
        weight, expected = (fixture[f"conure/T{number + 1}/{name}"] for name in ("weight", "mask"))
        chosen = choose(weight, is_free, (1 - SPARSITY) * SPARSITY**number)
        assert torch.equal(chosen.double(), expected)
        assert abs(weight.abs()[chosen].min() - fixture[f"conure/T{number + 1}/threshold"][0]) <= 1e-10
        is_free &= ~chosen


@settings(deadline=None)
@given(
    values=st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=40),
    share=st.integers(0, 100),
)
def test_choice_is_that_of_a_sorted_list(values: list[tuple[int, bool]], share: int) -> None:
    weight = torch.tensor([float(value) for value, _ in values])
    is_free = torch.tensor([free for _, free in values])
    sizes = sorted((abs(value) for value, free in values if free), reverse=True)
    rank = share * len(values) // 100
    least = sizes[rank] if rank < len(sizes) else 0
    assert choose(weight, is_free, share / 100).tolist() == [free and abs(value) >= least for value, free in values]


def owners_of(method: Conure) -> dict[str, torch.Tensor]:
    return {name: method.get_buffer("owners_" + name.replace(".", "_")) for name in method.network.kernels()}


def taught(backbone: str, num_tasks: int) -> Conure:
    method = tiny_method("conure", backbone)
    for kind in ("next_item", "item", "label")[:num_tasks]:
        teach(method, kind)
    assert isinstance(method, Conure)
    return method


def test_kernels_are_the_matrices_at_mask_points() -> None:
    assert tiny_method("conure").network.kernels() == tuple(
        f"blocks.{block}.conv{layer}.weight" for block in (0, 1) for layer in (1, 2)
    )
    assert tiny_method("conure", "dense").network.kernels() == ("first.weight", "second.weight", "last.weight")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_task_owns_its_share_of_every_kernel(backbone: str) -> None:
    method = taught(backbone, 3)
    for owners in owners_of(method).values():
        for number in range(3):
            # r + 1 weights, r being the share rounded down; 0.3, 0.21, 0.147 of 64 or 192 are not near an integer.
            assert int((owners == number).sum()) == int(0.3 * 0.7**number * owners.numel()) + 1
        assert set(owners.unique().tolist()) == {0, 1, 2, FREE}


def masked(method: Conure, used: dict[str, torch.Tensor]) -> Conure:
    """A copy in which all weights that are not used are 0, and which is not masked any more."""
    bare = copy.deepcopy(method)
    parameters = dict(bare.network.backbone.named_parameters())
    for name, mask in used.items():
        parameters[name].data[~mask] = 0
        owners_of(bare)[name].fill_(0)
    return bare


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_task_uses_its_weights_and_those_of_tasks_before(backbone: str) -> None:
    method = taught(backbone, 3)
    for number, answer in enumerate(answers(method)):
        bare = masked(method, {name: owners <= number for name, owners in owners_of(method).items()})
        items, _ = samples("item", size=9, seed=99)
        torch.testing.assert_close(bare.network.logits(items, number), answer, rtol=0, atol=0)


def test_before_pruning_a_task_uses_all_weights() -> None:
    method = taught("nextitnet", 1)
    method.begin_task(spec(1, "item"))
    method.begin_phase("train")
    items, labels = samples("item")
    assert torch.equal(method.logits(items, 1), method.network.logits(items, 1))
    loss, _ = method.loss(items, labels, Progress(0, 1))
    assert loss.item() == pytest.approx(F.cross_entropy(method.network.logits(items, 1), labels).item(), rel=1e-6)


@pytest.mark.parametrize("phase", ["train", "retrain"])
@pytest.mark.parametrize("num_past", [0, 1, 2])
def test_only_the_phase_s_own_weights_move(phase: str, num_past: int) -> None:
    method = taught("nextitnet", num_past)
    method.begin_task(spec(num_past, "label"))
    if phase == "retrain":
        optimize(method, "label", 2)
    method.begin_phase(phase)
    before = values(method.network.backbone)
    for seed in range(4):
        optimize(method, "label", 3, seed=seed)
    owners = owners_of(method)
    for name, parameter in method.network.backbone.named_parameters():
        moved = parameter != before[name]
        if name in owners:
            trained = owners[name] == (FREE if phase == "train" else num_past)
            assert not (moved & ~trained).any(), name
            assert (moved & trained).sum() > 0.5 * trained.sum(), name
        else:
            assert moved.any() == (num_past == 0), name


def test_the_loss_is_that_of_the_published_formula() -> None:
    """Gradients of W = sum_{j<i} stop_grad(W M_j) + W M_i, written out on a plain network."""
    method = taught("dense", 2)
    method.begin_task(spec(2, "label"))
    method.begin_phase("retrain")
    items, labels = samples("label")
    loss, _ = method.loss(items, labels, Progress(0, 1))
    method.zero_grad()
    loss.backward()
    owners = owners_of(method)
    bare = masked(method, {name: mask <= 2 for name, mask in owners.items()})
    bare.zero_grad()
    expected = F.cross_entropy(bare.network.logits(items, 2), labels)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    theirs = dict(bare.network.backbone.named_parameters())
    for name, parameter in method.network.backbone.named_parameters():
        if name in owners:
            torch.testing.assert_close(parameter.grad, theirs[name].grad * (owners[name] == 2))


def test_unkept_weights_are_left_as_they_are() -> None:
    method = taught("nextitnet", 1)
    before = values(method.network.backbone)
    method.begin_task(spec(1, "item"))
    method.begin_phase("train")
    assert all(torch.equal(value, before[name]) for name, value in method.network.backbone.named_parameters())


def test_many_tasks_use_up_the_weights_without_an_error() -> None:
    method = tiny_method("conure", "dense", sparsity=0.05)
    for number in range(5):
        teach(method, "label", num_steps=1)
        for owners in owners_of(method).values():
            assert (owners == number).any() or not (owners == FREE).any()
    assert all((owners < FREE).all() for owners in owners_of(method).values())
    teach(method, "item", num_steps=2)  # with a head alone
