"""CONURE: every task prunes the weights that are still free, keeps some for itself, and freezes them.

A task has two phases. `train`: all weights are active, those of past tasks frozen. Then the largest of the free
weights of every kernel are kept. `retrain`: the task is trained on its own weights and those of past tasks, as it will
be used.

Source: Yuan et al., SIGIR 2021 (arXiv 2009.13724), fajieyuan/SIGIR2021_Conure@7ada98f:generator_prune.py. As there,
weights that a task does not keep are left at their values, from which the next task starts.
Differs: the loss is the cross-entropy over all classes that all methods here share (there sampled softmax, then BPR);
blocks are those of the backbone (there with layer norm and ReLU before the convolution); biases are trained, by the
first task; biases, layer norms and item embeddings are the first task's and are frozen afterwards.
"""

import torch
from pydantic import Field

from userrep.config import Config
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec, Weights

FREE = torch.iinfo(torch.int16).max  # the owner of a weight that no task has kept


class ConureConfig(Config):
    """Options of CONURE."""

    sparsity: float = Field(default=0.7, gt=0, lt=1)  # share of what was free that a task leaves free


class Conure(Method):
    """One network whose weights belong to the tasks; past tasks stay exactly as they were."""

    phases = ("train", "retrain")
    takes_pretrained = False  # what is pruned must be trained again
    num_pruned: torch.Tensor

    def __init__(self, network: Network, config: ConureConfig) -> None:
        super().__init__(network)
        self.config = config
        self.register_buffer("num_pruned", torch.zeros((), dtype=torch.int64))  # tasks that have chosen their weights
        parameters = dict(network.backbone.named_parameters())
        for name in network.kernels():
            owners = torch.full_like(parameters[name], FREE, dtype=torch.int16, requires_grad=False)
            self.register_buffer(_buffer(name), owners)

    def begin_task(self, task: TaskSpec) -> None:
        """A later task trains its head and the kernels."""
        if self.network.tasks:
            self.requires_grad_(False)
            parameters = dict(self.network.backbone.named_parameters())
            for name in self.network.kernels():
                parameters[name].requires_grad_(True)
        super().begin_task(task)

    @torch.no_grad()
    def begin_phase(self, phase: str) -> None:
        """Before `retrain` the task chooses its weights."""
        if phase != "retrain":
            return
        share = (1 - self.config.sparsity) * self.config.sparsity**self.current
        parameters = dict(self.network.backbone.named_parameters())
        for name in self.network.kernels():
            owners = self.get_buffer(_buffer(name))
            owners[choose(parameters[name], owners == FREE, share)] = self.current
        self.num_pruned.fill_(self.current + 1)

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task."""
        return self.network.loss(items_BL, labels_B, self.current, weights=self._weights(self.current)), {}

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task, (B, D), with the weights of all tasks up to it."""
        return self.network.vectors(items_BL, number, weights=self._weights(number))

    def _weights(self, number: int) -> Weights:
        """Kernels as a task uses them; of those, what belongs to tasks before it gets no gradient."""
        limit = number if number < self.num_pruned else FREE  # in the phase `train` free weights are used too
        parameters = dict(self.network.backbone.named_parameters())
        weights: dict[str, torch.Tensor] = {}
        for name in self.network.kernels():
            weight, owners = parameters[name], self.get_buffer(_buffer(name))
            own = torch.where(owners >= number, weight, weight.detach())
            weights[name] = torch.where(owners <= limit, own, 0)
        return weights


def choose(weight: torch.Tensor, is_free: torch.Tensor, share: float) -> torch.Tensor:
    """Which weights a task keeps: the free ones of the largest absolute values, bool of the kernel's shape.

    Those at least as large as the one of 0-based rank r, so r + 1 or, where values are equal, more of them; all that
    are free if they are fewer.
    Source: fajieyuan/SIGIR2021_Conure@7ada98f:generator_prune.py. Differs: never a weight that is not free (there all,
    where fewer than r + 1 are free).

    Args:
        weight: a kernel.
        is_free: bool of its shape; the weights that no task has kept.
        share: of all weights of the kernel; r is this share, in float32, rounded down.
    """
    rank = int(torch.tensor(share * weight.numel(), dtype=torch.float32))
    sizes = weight.abs()[is_free].sort(descending=True).values
    if rank >= len(sizes):
        return is_free.clone()
    return is_free & (weight.abs() >= sizes[rank])


def _buffer(name: str) -> str:
    """Name of a kernel's owners; names of buffers have no dots."""
    return "owners_" + name.replace(".", "_")
