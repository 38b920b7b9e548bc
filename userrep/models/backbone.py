"""What methods of continual learning know of a user encoder: one vector per user, and numbered mask points.

Legend: `B` users, `L` positions of a history, `N` rows of a layer's output, `D` width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import nn

# Changes the output of a layer at a mask point: (number of the point, (N, D)) -> (N, D).
Adapter = Callable[[int, torch.Tensor], torch.Tensor]


class Backbone(nn.Module, ABC):
    """A user encoder.

    Attributes:
        dim: width of the user vectors and of all mask points.
        num_points: number of mask points, in the order in which a forward pass meets them.
    """

    dim: int
    num_points: int

    @abstractmethod
    def forward(self, items_BL: torch.Tensor, adapt: Adapter | None = None, last_only: bool = True) -> torch.Tensor:
        """User vectors (B, D), or with `last_only=False` the vectors of all prefixes (B, L, D).

        Args:
            items_BL: histories, oldest item first, left-padded with 0, int64.
            adapt: called with the output of every mask point in turn.
            last_only: whether only the last position is asked for.
        """

    @abstractmethod
    def wiring(self) -> dict[str, tuple[int | None, int | None]]:
        """For every parameter the mask point of what it computes, and of what it reads; None: not at a mask point."""
