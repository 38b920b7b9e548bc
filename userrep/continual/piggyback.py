"""Piggyback: the first task trains the network, every later one learns which of its weights to use.

Source: Mallya et al., ECCV 2018 (arXiv 1801.06519), and arunmallya/piggyback: masks start at 1e-2, are open above 5e-3,
and the gradient passes the threshold unchanged. Differs: masked are the weight matrices at mask points; biases, layer
norms and item embeddings are those of the first task.
"""

from collections.abc import Iterable
from typing import cast

import torch
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec, Weights


class PiggybackConfig(Config):
    """Options of Piggyback."""

    mask_init: float = 1e-2  # of every weight
    threshold: float = 5e-3  # a weight is used where its mask is above
    # Source: arunmallya/piggyback, 1e-4 with Adam: at the threshold after 50 steps at the earliest.
    mask_learning_rate: float = Field(default=1e-4, gt=0)


class Piggyback(Method):
    """A frozen network and one mask per later task; past tasks stay exactly as they were."""

    def __init__(self, network: Network, config: PiggybackConfig) -> None:
        super().__init__(network)
        self.config, self.mask_learning_rate = config, config.mask_learning_rate
        self.masks = nn.ModuleList()  # real-valued, of all tasks but the first: one for each kernel

    def begin_task(self, task: TaskSpec) -> None:
        """Freezes all there is; a later task gets masks that let every weight through."""
        if self.network.tasks:
            self.requires_grad_(False)
            parameters, start = dict(self.network.backbone.named_parameters()), self.config.mask_init
            self.masks.append(nn.ParameterList(torch.full_like(parameters[n], start) for n in self.network.kernels()))
        super().begin_task(task)

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """Real-valued masks."""
        return self.masks.parameters()

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task."""
        return self.network.loss(items_BL, labels_B, self.current, weights=self._weights(self.current)), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D)."""
        return self.network.vectors(items_BL, number, weights=self._weights(number))

    def _weights(self, number: int) -> Weights | None:
        """Kernels under the masks of a task."""
        if number == 0:
            return None
        parameters, masks = (
            dict(self.network.backbone.named_parameters()),
            cast(nn.ParameterList, self.masks[number - 1]),
        )
        return {
            name: parameters[name] * open_above(mask, self.config.threshold)
            for name, mask in zip(self.network.kernels(), masks, strict=True)
        }


def open_above(mask: torch.Tensor, threshold: float) -> torch.Tensor:
    """1 where a real-valued mask is above the threshold, else 0; its gradient is that of the result (straight-through).

    Args:
        mask: of any shape.
        threshold: at which a mask is closed.
    """
    return (mask > threshold).to(mask.dtype) + (mask - mask.detach())
