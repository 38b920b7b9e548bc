"""What holds for all methods, on both backbones: they learn, they can be stored, and some of them forget nothing."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from tests.support.continual import (
    BACKBONES,
    NUM_CLASSES,
    answers,
    optimize,
    samples,
    spec,
    teach,
    tiny_method,
    values,
)
from userrep.config import ConfigError
from userrep.continual.catalog import METHODS
from userrep.continual.method import Method, Progress
from userrep.continual.network import TaskKind

ISOLATING = ("sinmo", "peterrec", "piggyback", "conure")
KINDS: tuple[TaskKind, ...] = ("next_item", "item", "label")
kinds_of_tasks = st.lists(st.sampled_from(KINDS), min_size=2, max_size=4)


@pytest.mark.parametrize("name", METHODS)
def test_every_task_is_learned(name: str) -> None:
    method = tiny_method(name)
    for number, kind in enumerate(("next_item", "label")):
        teach(method, kind, num_steps=30)
        items, labels = samples(kind)
        if kind == "next_item":
            labels = items[:, -1]
        error = F.cross_entropy(method.logits(items, number), labels).item()
        assert error < 0.3 * math.log(NUM_CLASSES[kind]), kind  # of guessing


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_is_handed_to_the_optimizer_and_nothing_else_moves(name: str, backbone: str) -> None:
    method = tiny_method(name, backbone)
    for number, kind in enumerate(KINDS):
        method.begin_task(spec(number, kind))
        for phase in method.phases:
            method.begin_phase(phase)
            optimize(method, kind, 2)  # behind a layer that starts at 0 there is no gradient in the first step
            before, handed = values(method), {id(parameter) for parameter in method.trainable()}
            method.zero_grad()
            method.loss(*samples(kind), Progress(1, 2))[0].backward()
            for parameter_name, parameter in method.named_parameters():
                # The other heads of a joint method have batches of their own.
                is_other_head = (
                    method.is_joint and parameter_name.startswith("network.heads") and parameter.grad is None
                )
                if id(parameter) in handed and not is_other_head:
                    assert parameter.grad is not None, parameter_name
                    assert parameter.grad.any(), parameter_name
            optimize(method, kind, 1)
            for parameter_name, parameter in method.named_parameters():
                assert id(parameter) in handed or torch.equal(parameter, before[parameter_name]), parameter_name
        method.end_task()


@pytest.mark.parametrize("name", METHODS)
def test_masks_have_a_learning_rate_of_their_own(name: str) -> None:
    method = tiny_method(name)
    for number, kind in enumerate(KINDS):
        method.begin_task(spec(number, kind))
        masks = {id(parameter) for parameter in method.mask_parameters()}
        assert bool(masks) == (name in ("teracon", "hat") or (name == "piggyback" and number > 0))
        rate_of = {id(p): group["lr"] for group in method.parameter_groups(0.5) for p in group["params"]}
        assert rate_of.keys() == {id(parameter) for parameter in method.trainable()}
        assert all(rate == (method.mask_learning_rate if key in masks else 0.5) for key, rate in rate_of.items())
        method.end_task()


@pytest.mark.parametrize("name", ISOLATING)
@pytest.mark.parametrize("backbone", BACKBONES)
@settings(deadline=None, max_examples=5)
@given(kinds=kinds_of_tasks, seed=st.integers(0, 2**31))
def test_later_tasks_leave_the_answers_of_past_ones_bit_equal(
    name: str, backbone: str, kinds: list[TaskKind], seed: int
) -> None:
    method = tiny_method(name, backbone, seed)
    known: list[torch.Tensor] = []
    for kind in kinds:
        teach(method, kind, seed=seed)
        now = answers(method)
        assert all(torch.equal(old, new) for old, new in zip(known, now, strict=False)), kinds
        known = now


@pytest.mark.parametrize("name", ISOLATING)
def test_they_are_bit_equal_also_while_a_task_is_taught(name: str) -> None:
    method = tiny_method(name)
    teach(method, "next_item")
    [before] = answers(method)
    method.begin_task(spec(1, "item"))
    assert torch.equal(answers(method)[0], before)
    for phase in method.phases:
        method.begin_phase(phase)
        assert torch.equal(answers(method)[0], before)
        optimize(method, "item", 2)
        assert torch.equal(answers(method)[0], before)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ISOLATING])
def test_the_other_methods_change_past_answers(name: str) -> None:
    method = tiny_method(name)
    teach(method, "next_item")
    [before] = answers(method)
    teach(method, "item")
    assert not torch.equal(answers(method)[0], before)


def replayed(name: str, kinds: list[TaskKind]) -> Method:
    """A method that was told the tasks but taught nothing."""
    method = tiny_method(name, seed=7)
    for number, kind in enumerate(kinds):
        method.begin_task(spec(number, kind))
        method.end_task()
    return method


@pytest.mark.parametrize("name", METHODS)
@settings(deadline=None, max_examples=4)
@given(kinds=kinds_of_tasks)
def test_the_state_holds_all_that_answers_need(name: str, kinds: list[TaskKind]) -> None:
    method = tiny_method(name)
    for kind in kinds:
        teach(method, kind)
    restored = replayed(name, kinds)
    assert not all(map(torch.equal, answers(restored), answers(method)))
    restored.load_state_dict(load(save(method.state_dict())))
    assert all(map(torch.equal, answers(restored), answers(method)))
    # What is taught next is the same too: nothing that counts is outside of the state.
    for continued in (method, restored):
        torch.manual_seed(3)
        teach(continued, "label")
    assert all(map(torch.equal, answers(restored), answers(method)))


@pytest.mark.parametrize("name", METHODS)
def test_the_state_within_a_task_can_be_loaded(name: str) -> None:
    method, restored = tiny_method(name, seed=1), tiny_method(name, seed=2)
    for candidate in (method, restored):
        teach(candidate, "next_item")
        candidate.begin_task(spec(1, "label"))
        candidate.begin_phase(candidate.phases[-1])
    optimize(method, "label", 2)
    restored.load_state_dict(load(save(method.state_dict())))
    assert all(map(torch.equal, answers(restored), answers(method)))


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_is_independent(name: str) -> None:
    method = tiny_method(name)
    teach(method, "next_item")
    before, other = answers(method), copy.deepcopy(method)
    teach(other, "item")
    assert torch.equal(answers(method)[0], before[0])
    assert method.current == 0
    assert other.current == 1


@pytest.mark.parametrize("name", METHODS)
def test_shapes_of_answers(name: str) -> None:
    method = tiny_method(name, "dense").double()
    for kind in KINDS:
        teach(method, kind, num_steps=1)
    assert [(tuple(answer.shape), answer.dtype) for answer in answers(method)] == [
        ((9, NUM_CLASSES[kind]), torch.float64) for kind in KINDS
    ]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_of_a_backbone_is_wired(backbone: str) -> None:
    model = BACKBONES[backbone]()
    assert set(model.wiring()) == {name for name, _ in model.named_parameters()}


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown method 'ewc': use one of sinmo, "):
        tiny_method("ewc")
    with pytest.raises(ConfigError, match="sparsty"):
        tiny_method("conure", sparsty=0.5)
    with pytest.raises(ConfigError, match="sparsity"):
        tiny_method("conure", sparsity=1.0)
