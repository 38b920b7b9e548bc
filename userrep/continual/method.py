"""The contract between a method of continual learning and the loop that trains it (`training/continual.py`).

The loop calls, for every task: `begin_task`; for every phase `begin_phase` and, for every step, `loss`, `backward`,
`before_step`, the optimizer's step, `after_step`; at last `end_task`. Then every task so far is evaluated by `logits`,
or by `vectors` where it has no classes.
A method knows nothing of data, of the optimizer, or of the backbone behind its network.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from userrep.continual.network import Network, TaskSpec


@dataclass(frozen=True, eq=False)
class Progress:
    """Where in a phase a step is.

    Attributes:
        step: of the epoch, from 0.
        num_steps: of an epoch.
        task: number of the task that the batch is of; None: the current one. Only a joint method is asked for others.
        rows: which user each history of the batch is of, int64 (B,): equal rows of a task have equal histories. None:
            not known.
    """

    step: int
    num_steps: int
    task: int | None = None
    rows: torch.Tensor | None = None


class Method(nn.Module, ABC):
    """A network, and what the method adds to it."""

    phases: tuple[str, ...] = ("train",)  # of every task; each is trained until it stops to improve
    # A joint method is taught all tasks at once: `begin_task` of each, then the phases, in which batches are of any
    # task and `Progress.task` says of which.
    is_joint: bool = False
    # Whether the first task may be an encoder that was trained elsewhere, so that its own phases are left out.
    takes_pretrained: bool = True
    mask_learning_rate: float = 1.0  # of `mask_parameters`; that of all other parameters is the task's

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network: Network = network

    @property
    def current(self) -> int:
        """Number of the task that is taught, the newest one, from 0."""
        return len(self.network.tasks) - 1

    def begin_task(self, task: TaskSpec) -> None:
        """Makes room for a task. Random numbers are drawn from torch's global generator."""
        self.network.add_task(task)

    def make_room(self, tasks: Iterable[TaskSpec]) -> None:
        """Gives a new method what it had after these tasks, but for the values, which a saved state brings."""
        for task in tasks:
            self.begin_task(task)
            self.end_task()

    def begin_phase(self, phase: str) -> None:
        """Called before the first step of every phase."""

    @abstractmethod
    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What the current task's batch is to minimise, and metrics of it.

        Args:
            items_BL: histories, left-padded with 0.
            labels_B: classes in the current task.
            progress: of the phase.
        """

    def before_step(self, progress: Progress) -> None:
        """Called when the gradients are complete; may change them."""

    def after_step(self) -> None:
        """Called after the optimizer's step; may change the parameters."""

    def end_task(self) -> None:
        """Called with the best parameters of the last phase."""

    @abstractmethod
    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """User vectors that a task that was taught is predicted from, (B, D), as the finished method gives them."""

    def logits(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Scores of all classes of a task that was taught, (B, C)."""
        return self.network.heads[number](self.vectors(items_BL, number))

    def final_masks(self, number: int) -> torch.Tensor | None:
        """Soft masks of a task as `logits` uses them, (K, D) over mask points and channels; None: there are none."""
        return None

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of masks. What matters of them is on which side of a threshold they are, far away or near by."""
        return ()

    def parameter_groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """What the optimizer of the current phase gets: `trainable()`, with its learning rates."""
        masks = {id(parameter) for parameter in self.mask_parameters()}
        groups: dict[float, list[nn.Parameter]] = {learning_rate: []}
        for parameter in self.trainable():
            rate = self.mask_learning_rate if id(parameter) in masks else learning_rate
            groups.setdefault(rate, []).append(parameter)
        return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]

    def trainable(self) -> Iterator[nn.Parameter]:
        """Parameters that are trained in the current phase; those without `requires_grad` are left out."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)
