"""Tiny tasks and backbones for methods of continual learning, and a loop that keeps their contract."""

import torch
from torch import nn

from userrep.continual.catalog import build_method
from userrep.continual.method import Method, Progress
from userrep.continual.network import TaskKind, TaskSpec
from userrep.models.backbone import Adapter, Backbone
from userrep.models.nextitnet import NextItNet, NextItNetConfig

DIM, NUM_ITEMS, LENGTH = 8, 13, 7
NUM_CLASSES: dict[TaskKind, int] = {"next_item": NUM_ITEMS, "item": 5, "label": 3}
LEARNING_RATE = 0.02


class Dense(Backbone):
    """Mean of item embeddings, three layers: a matrix before, between and behind two mask points."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.num_points = DIM, 2
        self.item_embedding = nn.Embedding(NUM_ITEMS, DIM)
        self.first, self.second, self.last = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)

    def forward(self, items_BL: torch.Tensor, adapt: Adapter | None = None, last_only: bool = True) -> torch.Tensor:
        x_BLD = self.item_embedding(items_BL).cumsum(1) / torch.arange(1, items_BL.shape[1] + 1)[:, None]
        hidden = (x_BLD[:, -1] if last_only else x_BLD).flatten(0, -2)
        for point, layer in enumerate((lambda x: torch.tanh(self.first(x)), lambda x: self.norm(self.second(x)))):
            hidden = layer(hidden)
            hidden = hidden if adapt is None else adapt(point, hidden)
        hidden = self.last(hidden)
        return hidden if last_only else hidden.unflatten(0, items_BL.shape)

    def wiring(self) -> dict[str, tuple[int | None, int | None]]:
        return {
            "item_embedding.weight": (None, None),
            **{"first.weight": (0, None), "first.bias": (0, None)},
            **{"second.weight": (1, 0), "second.bias": (1, None)},
            **{"last.weight": (None, 1), "last.bias": (None, None)},
            **{"norm.weight": (1, None), "norm.bias": (1, None)},
        }


def new_nextitnet() -> NextItNet:
    return NextItNet(NextItNetConfig(dim=DIM, dilations=(1, 2)), NUM_ITEMS)


BACKBONES = {"nextitnet": new_nextitnet, "dense": Dense}


def tiny_method(name: str, backbone: str = "nextitnet", seed: int = 0, **options: object) -> Method:
    torch.manual_seed(seed)
    return build_method(name, options, BACKBONES[backbone])


def spec(number: int, kind: TaskKind) -> TaskSpec:
    return TaskSpec(f"T{number + 1}", kind, NUM_CLASSES[kind])


def samples(kind: TaskKind, size: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Histories that count up from a random item, of random lengths, and labels that follow from the last item."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, NUM_ITEMS - 1, (size, 1), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (size, 1), generator=generator)
    items = (starts + torch.arange(LENGTH)) % (NUM_ITEMS - 1) + 1
    items[torch.arange(LENGTH) < LENGTH - lengths] = 0
    return items, items[:, -1] % NUM_CLASSES[kind]


def optimize(method: Method, kind: TaskKind, num_steps: int, task: int | None = None, seed: int = 0) -> list[float]:
    """One phase of one epoch, with a fresh Adam; returns the losses."""
    optimizer, losses = torch.optim.Adam(method.trainable(), lr=LEARNING_RATE), []
    for step in range(num_steps):
        progress = Progress(step, num_steps, task)
        loss, _ = method.loss(*samples(kind, seed=seed), progress)
        optimizer.zero_grad()
        loss.backward()
        method.before_step(progress)
        optimizer.step()
        method.after_step()
        losses.append(loss.item())
    return losses


def teach(method: Method, kind: TaskKind, num_steps: int = 3, seed: int = 0) -> list[float]:
    """One more task; returns the losses of all phases."""
    method.begin_task(spec(method.current + 1, kind))
    losses = []
    for phase in method.phases:
        method.begin_phase(phase)
        losses += optimize(method, kind, num_steps, seed=seed)
    method.end_task()
    return losses


@torch.no_grad()
def answers(method: Method) -> list[torch.Tensor]:
    """Logits of all tasks so far, of the same users."""
    items, _ = samples("item", size=9, seed=99)
    return [method.logits(items, number) for number in range(method.current + 1)]


def values(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
