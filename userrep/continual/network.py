"""What all methods train: a backbone, and a head for every task.

A task is of one of four kinds. `next_item`: at every position of a history the next item, over the whole item
vocabulary; the history's last item is what is held out, so the task never sees it as input. `item` and `label`: one
class of the history's user. `vector`: the user vector itself, of a backbone that was pretrained; it has no head and no
loss, its logits are the vector, and no mask closes any of it.

Legend: `B` users, `L` positions of a history, `D` width of user vectors, `C` classes of a task.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from userrep.models.backbone import Adapter, Backbone

TaskKind = Literal["next_item", "item", "label", "vector"]

HEAD_STD, HEAD_BIAS = 0.01, 0.1  # Source: Sein-Kim/TERACON@b48e074:teracon.py
Weights = Mapping[str, torch.Tensor]  # used in place of the backbone's parameters of these names
# Logits of all classes exist at once up to so many numbers, and beyond it for a chunk of the rows at a time: 64 MiB in
# float32, of which the loss holds a few copies. (torch's own choice of chunks is a few rows where classes are many, and
# then adds to the gradient of the whole head for each of them.)
MAX_LOGITS = 2**24


@dataclass(frozen=True)
class TaskSpec:
    """What a network has to know of a task.

    Attributes:
        name: unique among the tasks of a run.
        kind: see above.
        num_classes: C; of `next_item`, the item vocabulary with the pad; of `vector`, 1.
    """

    name: str
    kind: TaskKind
    num_classes: int


class Network(nn.Module):
    """A backbone and one linear head for each task, in the order in which the tasks came.

    Attributes:
        precision: bfloat16: matrix products of the backbone are rounded to it. Parameters, user vectors, heads and
            losses are of the parameters' type all the same: rounded to bfloat16, many of a million classes would tie,
            and torch's cross-entropy in chunks would add up its rows in bfloat16.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone: Backbone = backbone
        self.precision = torch.float32
        self.heads = nn.ModuleList()
        self.tasks: list[TaskSpec] = []

    def add_task(self, task: TaskSpec) -> None:
        """Adds a freshly initialised head."""
        if task.name in {known.name for known in self.tasks}:
            raise ValueError(f"task {task.name!r} is known already: a run teaches a task once, give the new one a name")
        self.tasks.append(task)
        if task.kind == "vector":
            self.heads.append(nn.Identity())
            return
        reference = next(self.backbone.parameters())
        head = nn.Linear(self.backbone.dim, task.num_classes, device=reference.device, dtype=reference.dtype)
        nn.init.normal_(head.weight, std=HEAD_STD)
        nn.init.constant_(head.bias, HEAD_BIAS)
        self.heads.append(head)

    def kernels(self) -> tuple[str, ...]:
        """Names of the weight matrices of the backbone that compute or read a mask point."""
        wiring = self.backbone.wiring()
        return tuple(n for n, p in self.backbone.named_parameters() if p.ndim == 2 and wiring[n] != (None, None))

    def vectors(
        self, items_BL: torch.Tensor, number: int, adapt: Adapter | None = None, weights: Weights | None = None
    ) -> torch.Tensor:
        """User vectors that task `number` predicts from, (B, D)."""
        return self._encode(self._seen(items_BL, number), adapt, weights, last_only=True)

    def logits(
        self, items_BL: torch.Tensor, number: int, adapt: Adapter | None = None, weights: Weights | None = None
    ) -> torch.Tensor:
        """Scores of all classes of task `number`, (B, C)."""
        return self.heads[number](self.vectors(items_BL, number, adapt, weights))

    def loss(
        self,
        items_BL: torch.Tensor,
        labels_B: torch.Tensor,
        number: int,
        adapt: Adapter | None = None,
        with_pads: bool = False,
        weights: Weights | None = None,
    ) -> torch.Tensor:
        """Mean cross-entropy of task `number` over all of its classes.

        Args:
            items_BL: histories, left-padded with 0.
            labels_B: classes; a `next_item` task has its targets in the histories and ignores them.
            number: of the task, which is not of kind `vector`.
            adapt: of the backbone.
            with_pads: count positions whose target is a pad too, as Sein-Kim/TERACON@b48e074 does.
            weights: of the backbone, in place of its own.
        """
        head = cast(nn.Linear, self.heads[number])
        if self.tasks[number].kind != "next_item":
            vectors, targets = self.vectors(items_BL, number, adapt, weights), labels_B
        else:
            vectors = self._encode(self._seen(items_BL, number), adapt, weights, last_only=False)
            targets = items_BL[:, 1:]
            chosen = torch.ones_like(targets, dtype=torch.bool) if with_pads else targets != 0
            vectors, targets = vectors[chosen], targets[chosen]
        num_classes = len(head.weight)
        options = None
        if len(vectors) * num_classes > MAX_LOGITS:
            rows = max(1, MAX_LOGITS // num_classes)
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        return F.linear_cross_entropy(vectors, head.weight, targets, linear_bias=head.bias, options=options)

    def _seen(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        return items_BL[:, :-1] if self.tasks[number].kind == "next_item" else items_BL

    def _encode(
        self, items_BL: torch.Tensor, adapt: Adapter | None, weights: Weights | None, last_only: bool
    ) -> torch.Tensor:
        with torch.autocast(items_BL.device.type, torch.bfloat16, enabled=self.precision == torch.bfloat16):
            vectors = functional_call(self.backbone, dict(weights or {}), (items_BL, adapt, last_only))
        return vectors.to(next(self.backbone.parameters()).dtype)
