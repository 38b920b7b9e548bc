"""HAT: hard attention to the task. Soft masks that harden, and gradients that spare what past tasks use.

Source: Serra et al. 2018 (arXiv 1801.01423), joansj/hat@6fd0b9d:src/approaches/hat.py, with s_max of TERACON.
Differs:
- What a residual block reads is the sum of all blocks before it, which no mask closes: it counts as used by all tasks.
  So a layer that reads it spares past tasks by the mask of its output alone, and what neither computes nor reads a
  mask point (item embeddings) is frozen after the first task. (The TERACON repository has no gradient gates.)
- The optimizer is the loop's, where HAT used SGD without momentum. To Adam a constant factor of a gradient means next
  to nothing, so the gate is on what a step changes; to plain SGD both are the same.
- Embeddings have a learning rate of their own.
- Gradients are not clipped (the code clips at a norm of 10,000).
- The first task has HAT's sparsity and compensation, which TERACON's has not (the published scores of the two after
  task 1 are equal, so there it is one training).
Gates protect weights, not outputs: a layer norm before the mask point mixes channels, so what a later task changes in
free channels shifts the others a little.

Legend: `K` mask points, `D` width.
"""

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.continual.masks import MAX_SCALE, TaskEmbeddings, annealed_scale, gate
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec

MAX_ARGUMENT = 50.0  # of the cosh of a compensated gradient, as in the code


class HatConfig(Config):
    """Options of HAT; the defaults are those of the papers."""

    sparsity_weight: float = Field(default=0.75, ge=0)  # lambda: of opening channels that no past task uses
    max_scale: float = Field(default=MAX_SCALE, gt=1)
    mask_learning_rate: float = Field(default=1e-2, gt=0)  # of embeddings
    compensate: bool = True  # undo what the annealed scale does to the gradient of embeddings


class Hat(Method):
    """One shared network with masks of each task; of a weight, a later task may change what past ones leave unused."""

    used: torch.Tensor  # (K, D) by past tasks: the maximum of their hardest masks

    def __init__(self, network: Network, config: HatConfig) -> None:
        super().__init__(network)
        self.config, self.mask_learning_rate = config, config.mask_learning_rate
        self._before: dict[str, torch.Tensor] = {}  # the backbone's parameters before the step
        backbone, like = network.backbone, next(network.backbone.parameters())
        self.embeddings = TaskEmbeddings(backbone.num_points, backbone.dim)
        self.register_buffer("used", like.new_zeros(backbone.num_points, backbone.dim))

    def begin_task(self, task: TaskSpec) -> None:
        """Adds head and embedding; freezes those of past tasks, and what all tasks use."""
        if self.network.tasks:
            self.network.heads.requires_grad_(False)
            self.embeddings.requires_grad_(False)
            parameters = dict(self.network.backbone.named_parameters())
            for name, points in self.network.backbone.wiring().items():
                parameters[name].requires_grad_(points != (None, None))
        super().begin_task(task)
        self.embeddings.add(like=next(self.network.parameters()))

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task plus lambda times the share of free channels that it opens."""
        masks_KD = self.embeddings.plain(self.current, self._scale(progress))
        loss = self.network.loss(items_BL, labels_B, self.current, gate(masks_KD))
        opened = opened_share(masks_KD, self.used)
        facts = {"train/task_loss": loss.item(), "train/opened_share": opened.item()}
        return loss + self.config.sparsity_weight * opened, facts

    @torch.no_grad()
    def before_step(self, progress: Progress) -> None:
        """Compensates the gradient of the embedding, and takes note of what past tasks use."""
        if self.current > 0:
            parameters = self.network.backbone.named_parameters()
            self._before = {name: p.clone() for name, p in parameters if p.requires_grad}
        embedding = self.embeddings.tasks[self.current]
        if self.config.compensate and embedding.grad is not None:
            embedding.grad.mul_(compensation(embedding, self._scale(progress), self.config.max_scale))

    @torch.no_grad()
    def after_step(self) -> None:
        """Takes back what the step has changed of what past tasks use, and clamps the task embeddings."""
        wiring = self.network.backbone.wiring()
        for name, parameter in self.network.backbone.named_parameters():
            if name in self._before:
                share = free_share(parameter, *(None if p is None else self.used[p] for p in wiring[name]))
                parameter.copy_(torch.lerp(self._before[name], parameter, share))
        self._before = {}
        self.embeddings.clamp()

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """Task embeddings."""
        return self.embeddings.parameters()

    @torch.no_grad()
    def end_task(self) -> None:
        """What the task uses is used from now on."""
        self.used.copy_(torch.maximum(self.used, self.final_masks(self.current)))

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task under its hardest masks, (B, D)."""
        return self.network.vectors(items_BL, number, gate(self.final_masks(number)))

    def final_masks(self, number: int) -> torch.Tensor:
        """Masks of a task at the largest scale, (K, D); all open of the vector itself."""
        if self.network.tasks[number].kind == "vector":
            return torch.ones_like(self.used)
        return self.embeddings.plain(number, self.config.max_scale)

    def _scale(self, progress: Progress) -> float:
        return annealed_scale(progress.step, progress.num_steps, self.config.max_scale)


def opened_share(masks_KD: torch.Tensor, used_KD: torch.Tensor) -> torch.Tensor:
    """Share of what past tasks leave free that a task opens, sum m (1 - used) / sum (1 - used).

    Args:
        masks_KD: of the task.
        used_KD: by past tasks; 0 in the first one, where the result is the mean mask.
    """
    free_KD = 1 - used_KD
    # Nothing can be opened where nothing is free.
    return (masks_KD * free_KD).sum() / free_KD.sum().clamp(min=torch.finfo(free_KD.dtype).tiny)


def free_share(like: torch.Tensor, used_out_D: torch.Tensor | None, used_in_D: torch.Tensor | None) -> torch.Tensor:
    """Factor of a parameter's change, 1 - min(used by output channel, used by input channel), (rows, columns).

    Args:
        like: a matrix (rows, columns) or vector (rows,) of the parameter's shape. Rows go through the output channels
            one or several times, columns through the input channels (those of a convolution once per tap).
        used_out_D: use of the channels that the parameter computes; None: all are used by all tasks.
        used_in_D: use of the channels that it reads; None as above.
    """
    used = torch.ones_like(like)
    for dim, used_D in enumerate((used_out_D, used_in_D)[: like.ndim]):
        if used_D is not None:
            side = used_D.repeat(like.shape[dim] // len(used_D))
            used = torch.minimum(used, side if like.ndim == 1 or dim == 1 else side[:, None])
    return 1 - used


def compensation(embedding: torch.Tensor, scale: float, max_scale: float) -> torch.Tensor:
    """Factor of the embedding's gradient that makes it independent of the annealed scale s.

    s_max / s * (cosh(s e) + 1) / (cosh(e) + 1), s e clipped to [-50, 50].

    Args:
        embedding: e, of any shape.
        scale: s.
        max_scale: s_max.
    """
    hardened = torch.clamp(scale * embedding, -MAX_ARGUMENT, MAX_ARGUMENT)
    return max_scale / scale * (torch.cosh(hardened) + 1) / (torch.cosh(embedding) + 1)
