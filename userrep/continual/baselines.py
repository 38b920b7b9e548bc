"""Three ways of learning several tasks without a method: each alone, one after another, all at once.

Source: Kim et al., KDD 2023 (arXiv 2306.01792), baselines SinMo, FineAll and MTL. Differs: what MTL of the paper is
trained on is not published; here every batch is of one task, and all tasks train the same network jointly.
"""

from collections.abc import Callable

import torch
from torch import nn

from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec, Weights
from userrep.models.backbone import Backbone


class FineAll(Method):
    """One network, all of it trained on task after task: what a past task needs may be overwritten."""

    def begin_task(self, task: TaskSpec) -> None:
        """Adds a head; those of past tasks are left as they are."""
        self.network.heads.requires_grad_(False)
        super().begin_task(task)

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task."""
        return self.network.loss(items_BL, labels_B, self.current), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D)."""
        return self.network.vectors(items_BL, number)


class Mtl(Method):
    """One network with a head for each task, trained on all of them jointly."""

    is_joint = True
    takes_pretrained = False  # the first task would not be among those that are trained jointly

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the batch's task."""
        number = self.current if progress.task is None else progress.task
        return self.network.loss(items_BL, labels_B, number), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D)."""
        return self.network.vectors(items_BL, number)


class SinMo(Method):
    """A network of its own for every task, each from scratch: what a task can learn without the others."""

    def __init__(self, network: Network, new_backbone: Callable[[], Backbone]) -> None:
        """Args: network is that of the first task; new_backbone makes a freshly initialised one like it."""
        super().__init__(network)
        self.later = nn.ModuleList()  # backbones of all tasks but the first
        self._new_backbone = new_backbone

    def begin_task(self, task: TaskSpec) -> None:
        """Makes a backbone and a head; nothing else is trained."""
        self.requires_grad_(False)
        super().begin_task(task)
        like = next(self.network.parameters())
        if self.current == 0:
            self.network.requires_grad_(True)
        else:
            self.later.append(self._new_backbone().to(like.device, like.dtype))

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task."""
        return self.network.loss(items_BL, labels_B, self.current, weights=self._weights(self.current)), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D)."""
        return self.network.vectors(items_BL, number, weights=self._weights(number))

    def _weights(self, number: int) -> Weights | None:
        """Of the task's backbone."""
        return self.later[number - 1].state_dict(keep_vars=True) if number else None
