"""What a kind of model brings to the training loop: the loop itself knows none of them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from userrep.data.batch import UserBatch
from userrep.training.encoding import MemoryConfig

Validate = Callable[[Any], dict[str, float]]  # a model in, metrics out


class Objective(nn.Module, ABC):
    """A model and its loss as one module, so that data parallelism wraps both."""

    @abstractmethod
    def forward(self, batch: UserBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """This worker's part of the loss, whose mean over workers is the loss of the global batch, and metrics.

        The metrics are of this worker's batch, and averaged over workers; `train/tokens` is therefore its tokens times
        the number of workers.
        """

    @abstractmethod
    def describe(self) -> str:
        """How the batches so far were computed, for the log."""


class System(Protocol):
    """A kind of model, with its data at hand."""

    def build_model(self) -> Any:
        """A freshly initialised model, from torch's global generator."""
        ...

    def build_objective(self, model: Any, memory: MemoryConfig) -> Objective:
        """The objective of the model.

        Args:
            model: from `build_model`; the objective shares it.
            memory: what a step may take; of no influence on the result.
        """
        ...

    @property
    def has_idle_parameters(self) -> bool:
        """Whether there are steps in which some parameters have no gradient."""
        ...

    def load_validation(self) -> Validate:
        """Reads held-out users. What it returns is a collective, and its metrics have `val/recall_at_10` among them."""
        ...
