"""PeterRec: patches, layer norms of each task, and that the rest is the first task's."""

import torch
import torch.nn.functional as F

from tests.support.continual import DIM, answers, samples, spec, teach, tiny_method, values
from userrep.continual.peterrec import Patch, PeterRec


def taught(num_tasks: int, **options: object) -> PeterRec:
    method = tiny_method("peterrec", **options)
    for kind in ("next_item", "item", "label")[:num_tasks]:
        teach(method, kind)
    assert isinstance(method, PeterRec)
    return method


def test_a_patch_is_the_published_sum_over_branches() -> None:
    torch.manual_seed(0)
    dim, cardinality, hidden_dim = 12, 2, 3  # of a branch
    patch = Patch(dim, cardinality * hidden_dim)
    for parameter in patch.parameters():
        parameter.data.normal_()
    x = torch.randn(5, dim)
    expected = x + patch.up.bias
    for branch in range(cardinality):
        own = slice(branch * hidden_dim, (branch + 1) * hidden_dim)
        hidden = F.gelu(x @ patch.down.weight[own].T + patch.down.bias[own])
        expected = expected + hidden @ patch.up.weight[:, own].T
    torch.testing.assert_close(patch(x), expected)


def test_a_new_task_starts_from_the_network_as_it_is() -> None:
    method = taught(1)
    method.begin_task(spec(1, "item"))
    items, _ = samples("item")
    assert torch.equal(method.logits(items, 1), method.network.logits(items, 1))


def test_only_patches_norms_and_the_head_of_the_task_are_trained() -> None:
    method = taught(2)
    before = values(method)
    teach(method, "label", num_steps=5)
    moved = {
        name for name, value in method.named_parameters() if name not in before or not torch.equal(value, before[name])
    }
    patches = {
        f"patches.1.{p}.{layer}.{part}" for p in range(4) for layer in ("down", "up") for part in ("weight", "bias")
    }
    norms = {f"norms.1.{number}" for number in range(8)}  # weight and bias of two in each of two blocks
    assert moved == patches | norms | {"network.heads.2.weight", "network.heads.2.bias"}


def test_answers_are_those_of_a_network_with_the_norms_and_patches_written_in() -> None:
    method = taught(3)
    items, _ = samples("item", size=9, seed=99)
    received = answers(method)
    backbone = method.network.backbone
    for number in (2, 1):
        norms = [f"blocks.{b}.norm{layer}.{part}" for b in (0, 1) for layer in (1, 2) for part in ("weight", "bias")]
        with torch.no_grad():
            for name, value in zip(norms, method.norms[number - 1], strict=True):
                backbone.get_parameter(name).copy_(value)
        patches = method.patches[number - 1]
        adapted = backbone(items, lambda point, hidden, patches=patches: patches[point](hidden))
        torch.testing.assert_close(method.network.heads[number](adapted), received[number], rtol=0, atol=0)


def test_widths_of_patches() -> None:
    for reduction, hidden_dim in ((8, 1), (3, 3), (1, DIM), (100, 1)):
        method = tiny_method("peterrec", reduction=reduction)
        method.begin_task(spec(0, "label"))
        method.begin_task(spec(1, "item"))
        assert isinstance(method, PeterRec)
        assert {tuple(patch.down.weight.shape) for patch in method.patches[0]} == {(hidden_dim, DIM)}
