"""The three baselines: forgetting, independence, and joint training."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.support.continual import NUM_CLASSES, answers, optimize, samples, spec, teach, tiny_method, values
from userrep.continual.baselines import FineAll, Mtl, SinMo
from userrep.continual.method import Progress
from userrep.continual.network import Network


def test_fineall_forgets_what_it_had_learned() -> None:
    method = tiny_method("fineall")
    teach(method, "next_item", num_steps=40)
    items, _ = samples("next_item")

    def error() -> float:
        return F.cross_entropy(method.logits(items, 0), items[:, -1]).item()

    learned = error()
    teach(method, "label", num_steps=40)
    assert error() > 2 * learned + 0.5


def test_fineall_leaves_past_heads_alone() -> None:
    method = tiny_method("fineall")
    teach(method, "next_item")
    head = values(method.network.heads[0])
    teach(method, "item")
    assert all(torch.equal(value, head[name]) for name, value in method.network.heads[0].named_parameters())
    assert isinstance(method, FineAll)


def test_a_task_of_sinmo_is_what_it_would_be_alone() -> None:
    method = tiny_method("sinmo")
    teach(method, "next_item")
    method.begin_task(spec(1, "item"))
    assert isinstance(method, SinMo)
    alone = FineAll(Network(copy.deepcopy(method.later[0])))
    alone.begin_task(spec(0, "item"))
    alone.network.heads[0].load_state_dict(method.network.heads[1].state_dict())
    assert optimize(method, "item", 5) == optimize(alone, "item", 5)
    assert torch.equal(answers(method)[1], answers(alone)[0])


def test_networks_of_sinmo_are_initialised_independently() -> None:
    method = tiny_method("sinmo")
    for number in range(3):
        method.begin_task(spec(number, "label"))
    first, second, third = (values(b) for b in (method.network.backbone, *method.later))
    for name in ("item_embedding.weight", "blocks.0.conv1.weight"):
        assert not torch.equal(first[name], second[name])
        assert not torch.equal(second[name], third[name])


def test_mtl_learns_all_tasks_from_batches_of_each() -> None:
    method = tiny_method("mtl")
    assert isinstance(method, Mtl)
    kinds = ("next_item", "item", "label")
    for number, kind in enumerate(kinds):
        method.begin_task(spec(number, kind))
    optimizer = torch.optim.Adam(method.trainable(), lr=0.02)
    for step in range(90):
        number = step % 3
        loss, _ = method.loss(*samples(kinds[number]), Progress(step, 90, number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for number, kind in enumerate(kinds):
        items, labels = samples(kind)
        error = F.cross_entropy(method.logits(items, number), items[:, -1] if number == 0 else labels)
        assert error.item() < 0.3 * torch.tensor(NUM_CLASSES[kind]).log().item()


@pytest.mark.parametrize("number", [0, 1, None])
def test_mtl_asks_the_head_of_the_batch_s_task(number: int | None) -> None:
    method = tiny_method("mtl")
    method.begin_task(spec(0, "item"))
    method.begin_task(spec(1, "item"))
    items, labels = samples("item")
    loss, _ = method.loss(items, labels, Progress(0, 1, number))
    expected = F.cross_entropy(method.logits(items, 1 if number is None else number), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    grads = [head.weight.grad is not None for head in method.network.heads]
    assert grads == ([True, False] if number == 0 else [False, True])
