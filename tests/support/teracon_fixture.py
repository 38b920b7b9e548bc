"""The official TERACON code's numbers, in this package's modules."""

from collections.abc import Iterator
from functools import cache
from typing import cast

import torch
from safetensors.torch import load_file

from tests.support.shared_data import shared_path
from userrep.continual.masks import RelationMasks
from userrep.continual.network import Network, TaskSpec
from userrep.continual.teracon import Teracon, TeraconConfig
from userrep.models.nextitnet import NextItNet, NextItNetConfig

DILATIONS, NUM_BLOCKS, DIM, NUM_ITEMS = (1, 2, 1, 2), 4, 8, 50
TASKS = (TaskSpec("T1", "next_item", NUM_ITEMS), TaskSpec("T2", "item", 7), TaskSpec("T3", "label", 3))


@cache
def load_fixture() -> dict[str, torch.Tensor]:
    """All tensors of the fixture; skips the test where it is absent."""
    return load_file(shared_path("parity/teracon/teracon_fixture.safetensors"))


def teracon(num_tasks: int, with_teacher: bool, dtype: torch.dtype) -> Teracon:
    """The method as it is right after `begin_task` of its last task, with the fixture's weights."""
    network = Network(NextItNet(NextItNetConfig(dim=DIM, dilations=DILATIONS), NUM_ITEMS))
    method = Teracon(network, TeraconConfig(with_pads=True)).to(dtype)
    for task in TASKS[:num_tasks]:
        method.begin_task(task)
    if not with_teacher:
        method.teacher = None
        method.relations = RelationMasks(method.embeddings) if num_tasks > 1 else None
    return method


def load_weights(method: Teracon, prefix: str) -> Teracon:
    """Copies the fixture's weights under a prefix, e.g. `task2/init`, into a method."""
    fixture = load_fixture()
    with torch.no_grad():
        for role, part in roles(method):
            part.copy_(to_ours(role, fixture[f"{prefix}/{role}"]).reshape(part.shape))
    return method


def roles(method: Teracon) -> Iterator[tuple[str, torch.Tensor]]:
    """Every trained tensor by its role; embeddings and relation maps as views of the stacked parameters."""
    backbone = cast(NextItNet, method.network.backbone)
    yield "item_embedding", backbone.item_embedding.weight
    for k, block in enumerate(backbone.blocks):
        for layer in (1, 2):
            for theirs, ours in ((f"conv{layer}", f"conv{layer}"), (f"ln{layer}", f"norm{layer}")):
                for part in ("weight", "bias"):
                    yield f"block{k}.{theirs}.{part}", getattr(getattr(block, ours), part)
        for task, embedding in enumerate(method.embeddings.tasks):
            yield f"block{k}.task_emb.{task}", embedding[2 * k : 2 * k + 2]
            if method.relations is not None:
                for layer in (1, 2):
                    point = 2 * k + layer - 1
                    yield f"block{k}.rel_mlp{layer}.{task}.weight", method.relations.weights[task][point]
                    yield f"block{k}.rel_mlp{layer}.{task}.bias", method.relations.biases[task][point]
    for task, head in enumerate(method.network.heads):
        for part in ("weight", "bias"):
            yield f"classifier.{task}.{part}", getattr(head, part)


def gradients(method: Teracon) -> dict[str, torch.Tensor]:
    """Gradients by role, zero where there is none."""
    values = {id(p): p.detach().clone() for p in method.parameters()}
    grads: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        for role, part in roles(method):
            grads[role] = part.detach().clone()
        for parameter in method.parameters():
            parameter.copy_(values[id(parameter)])
    return grads


def to_ours(role: str, tensor: torch.Tensor) -> torch.Tensor:
    """A convolution's kernel (out, in, 1, tap) as a matrix (out, tap * in); everything else as it is."""
    if ".conv" in role and role.endswith("weight"):
        return tensor.squeeze(2).transpose(1, 2).flatten(1)
    return tensor
