"""Soft task masks: a task opens and closes channels of the layer outputs by embeddings of its own.

Source: Serra et al. 2018 (HAT, arXiv 1801.01423) for masks, scale and clamp; Kim et al., KDD 2023 (TERACON) for the
relation-aware mask, as in Sein-Kim/TERACON@b48e074:teracon.py.

Legend: `M` tasks, `K` mask points, `D` width.
"""

import torch
from torch import nn

from userrep.models.backbone import Adapter

MAX_SCALE = 50.0  # s_max of the TERACON code
MAX_EMBEDDING = 6.0  # embeddings are clamped to this absolute value after every step
RELATION_STD, RELATION_BIAS = 0.01, 0.1


def annealed_scale(step: int, num_steps: int, max_scale: float = MAX_SCALE) -> float:
    """The scale s of a step, from 1 / s_max towards s_max.

    Source: Sein-Kim/TERACON@b48e074:train_teracon.py. Differs: an epoch has a whole number of steps (there samples over
    batch size, as it drops the last batch). HAT's own formula reaches s_max in the last step.

    Args:
        step: of the epoch, from 0.
        num_steps: of an epoch.
        max_scale: s_max.
    """
    return 1 / max_scale + (max_scale - 1 / max_scale) * step / num_steps


def gate(masks_KD: torch.Tensor) -> Adapter:
    """Multiplies the output of every mask point with its mask."""
    return lambda point, hidden_ND: hidden_ND * masks_KD[point]


class TaskEmbeddings(nn.Module):
    """One embedding per task and mask point."""

    def __init__(self, num_points: int, dim: int) -> None:
        super().__init__()
        self._shape = num_points, dim
        self.tasks = nn.ParameterList()

    def add(self, like: torch.Tensor) -> None:
        """Adds a task, uniform in [0, 2]; `like` gives device and type."""
        self.tasks.append(nn.Parameter(torch.empty(self._shape, device=like.device, dtype=like.dtype).uniform_(0, 2)))

    @torch.no_grad()
    def clamp(self) -> None:
        """Keeps every embedding where the sigmoid has a gradient."""
        for embedding in self.tasks:
            embedding.clamp_(-MAX_EMBEDDING, MAX_EMBEDDING)

    def plain(self, number: int, scale: float) -> torch.Tensor:
        """Masks of a task from its own embedding alone, sigmoid(s e), (K, D)."""
        return torch.sigmoid(scale * self.tasks[number])


class RelationMasks(nn.Module):
    """Masks of a task from the embeddings of all known tasks.

    m = sigmoid(s (w . z + b)), where z stacks tanh(s e) of the task itself and tanh(s e), tanh(-s e) of every other
    task in ascending order: a linear map over the tasks, one for every task and mask point, shared by the channels.
    """

    def __init__(self, embeddings: TaskEmbeddings) -> None:
        """Maps for all tasks that have embeddings; they are made anew when a task is added, as their inputs grow."""
        super().__init__()
        num_tasks, first = len(embeddings.tasks), embeddings.tasks[0]
        num_points = len(first)
        self.weights = nn.ParameterList(
            first.new_empty(num_points, 2 * num_tasks - 1).normal_(std=RELATION_STD) for _ in range(num_tasks)
        )
        self.biases = nn.ParameterList(first.new_full((num_points,), RELATION_BIAS) for _ in range(num_tasks))

    def forward(self, embeddings: TaskEmbeddings, number: int, scale: float) -> torch.Tensor:
        """Masks of a task, (K, D)."""
        own = torch.tanh(scale * embeddings.tasks[number])
        others = [torch.tanh(scale * e) for other, e in enumerate(embeddings.tasks) if other != number]
        stacked = torch.stack([own, *(part for other in others for part in (other, -other))], dim=1)
        mixed_KD = torch.einsum("kr,krd->kd", self.weights[number], stacked)
        return torch.sigmoid(scale * (mixed_KD + self.biases[number][:, None]))
