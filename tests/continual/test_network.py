"""A backbone in bfloat16: what is rounded, and what is not."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.support.continual import BACKBONES, NUM_CLASSES, answers, samples, spec, tiny_method
from userrep.continual import network as module
from userrep.continual.catalog import METHODS
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskKind

KINDS: tuple[TaskKind, ...] = ("next_item", "item")


def set_precision(method: Method, precision: torch.dtype) -> None:
    for part in method.modules():  # a teacher has a network of its own
        if isinstance(part, Network):
            part.precision = precision


def loss_and_gradients(method: Method, kind: TaskKind) -> tuple[float, torch.Tensor]:
    torch.manual_seed(1)
    method.zero_grad()
    loss, _ = method.loss(*samples(kind), Progress(1, 2))
    loss.backward()
    assert loss.dtype == torch.float32
    return loss.item(), torch.cat([p.grad.flatten() for p in method.trainable() if p.grad is not None])


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_losses_and_gradients_are_close_to_those_of_float32(name: str, backbone: str) -> None:
    method = tiny_method(name, backbone)
    method.network.precision = torch.bfloat16
    for number, kind in enumerate(KINDS):
        method.begin_task(spec(number, kind))
        optimizer = torch.optim.Adam(method.trainable(), lr=0.02)
        for phase in method.phases:
            method.begin_phase(phase)
            for _ in range(3):
                loss, grads = loss_and_gradients(method, kind)
                set_precision(method, torch.float32)
                expected_loss, expected = loss_and_gradients(method, kind)
                set_precision(method, torch.bfloat16)
                assert loss == pytest.approx(expected_loss, rel=0.02)
                assert loss != expected_loss
                # Of 8 channels, one whose rounded sum is on the other side of a ReLU tells.
                assert (grads - expected).norm() < 0.25 * expected.norm()
                loss_and_gradients(method, kind)
                optimizer.step()
                method.after_step()
        method.end_task()
    assert {parameter.dtype for parameter in method.parameters()} == {torch.float32}
    assert {answer.dtype for answer in answers(method)} == {torch.float32}


@pytest.mark.parametrize("max_logits", [module.MAX_LOGITS, 50])
def test_heads_and_cross_entropy_are_not_rounded(max_logits: int) -> None:
    """Whole, and in chunks."""
    method = tiny_method("fineall")
    method.network.precision = torch.bfloat16
    method.begin_task(spec(0, "item"))
    method.network.heads[0].weight.data.normal_(std=10)
    items, labels = samples("item")
    vectors, head = method.vectors(items, 0), method.network.heads[0]
    exact = F.linear(vectors.double(), head.weight.double(), head.bias.double())
    with mock.patch.object(module, "MAX_LOGITS", max_logits):
        loss, _ = method.loss(items, labels, Progress(0, 1))
    assert loss.item() == pytest.approx(F.cross_entropy(exact, labels).item(), rel=1e-6)
    torch.testing.assert_close(method.logits(items, 0).double(), exact, rtol=1e-5, atol=1e-5)
    assert len(items) * NUM_CLASSES["item"] > 50
