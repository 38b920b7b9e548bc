"""Piggyback: the threshold and its gradient, and masked weights against a network that has them."""

import copy

import torch

from tests.support.continual import DIM, answers, samples, spec, teach, tiny_method, values
from userrep.continual.piggyback import Piggyback, open_above


def taught(num_tasks: int) -> Piggyback:
    method = tiny_method("piggyback")
    for kind in ("next_item", "item", "label")[:num_tasks]:
        teach(method, kind)
    assert isinstance(method, Piggyback)
    return method


def test_the_threshold_lets_gradients_through() -> None:
    mask = torch.tensor([-1.0, 0.0, 5e-3, 5.001e-3, 1e-2, 3.0], requires_grad=True)
    opened = open_above(mask, 5e-3)
    assert opened.tolist() == [0, 0, 0, 1, 1, 1]
    weights = torch.arange(6.0)
    (opened * weights).sum().backward()
    assert mask.grad is not None
    assert torch.equal(mask.grad, weights)


def test_a_new_task_starts_from_the_whole_network() -> None:
    method = taught(1)
    method.begin_task(spec(1, "item"))
    items, _ = samples("item")
    assert torch.equal(method.logits(items, 1), method.network.logits(items, 1))


def test_a_mask_takes_weights_out() -> None:
    method = taught(3)
    items, _ = samples("item", size=9, seed=99)
    is_closed = [mask <= method.config.threshold for masks in method.masks for mask in masks]
    assert any(closed.any() for closed in is_closed)
    for number, answer in enumerate(answers(method)):
        bare = copy.deepcopy(method.network)
        parameters = dict(bare.backbone.named_parameters())
        for point, name in enumerate(bare.kernels() if number else ()):
            parameters[name].data[method.masks[number - 1][point] <= 5e-3] = 0
        torch.testing.assert_close(bare.logits(items, number), answer, rtol=0, atol=0)


def test_only_masks_and_the_head_of_the_task_are_trained() -> None:
    method = taught(2)
    before = values(method)
    teach(method, "label")
    moved = {
        name for name, value in method.named_parameters() if name not in before or not torch.equal(value, before[name])
    }
    assert moved == {f"masks.1.{kernel}" for kernel in range(4)} | {"network.heads.2.weight", "network.heads.2.bias"}
    assert [tuple(mask.shape) for mask in method.masks[1]] == [(DIM, 3 * DIM)] * 4
