"""Tiles of a matrix of logits, one after another in the same memory, and gradients from what they contribute.

Legend: `B` samples on this worker, `G` samples on all workers, `D` width, `R` and `C` rows and columns of a tile.
"""

from collections.abc import Iterator

import torch

from userrep.losses.negatives import Negatives, Tile

# Up to this scale exp(logit) and sums of 10^6 of them, and their inverses, are normal float32 numbers without the usual
# subtraction of a maximum, so one exponential serves rows and columns; beyond it the tile's exponential is float64.
MAX_FLOAT32_SCALE = 60.0
MAX_FLOAT32_SPREAD = 80.0  # likewise for scale + (largest - smallest column bias), which only makes numbers smaller


class Tiles:
    """Tiles of scale * anchor @ positive.T, one after another in the same memory."""

    def __init__(
        self,
        anchor_BD: torch.Tensor,
        positive_GD: torch.Tensor,
        scale: float,
        negatives: Negatives,
        size: int,
        bias_G: torch.Tensor | None = None,
    ) -> None:
        self._scaled_BD, self._positive_GD, self._negatives = anchor_BD * scale, positive_GD, negatives
        self.size = min(size, len(positive_GD))
        bias_G = anchor_BD.new_zeros(1) if bias_G is None else bias_G
        is_wide = scale > MAX_FLOAT32_SCALE or scale - float(bias_G.min()) > MAX_FLOAT32_SPREAD
        self.exp_dtype = torch.float64 if is_wide else anchor_BD.dtype
        self.factor_G = bias_G.exp().to(self.exp_dtype)

    def logits(self) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Every tile with its logits, which are the reader's until the next tile."""
        buffer = self._scaled_BD.new_empty(self.size**2)
        for tile in self._negatives.tiles(self.size):
            logits_RC = buffer[: len(tile.rows) * len(tile.columns)].view(len(tile.rows), len(tile.columns))
            torch.mm(self._scaled_BD[tile.rows.span], self._positive_GD[tile.columns.span].T, out=logits_RC)
            yield tile, logits_RC

    def exponentials(self) -> Iterator[tuple[Tile, torch.Tensor]]:
        """Every tile with exp(logit) of its negatives, zero elsewhere."""
        for tile, logits_RC in self.logits():
            exp_RC = logits_RC.to(self.exp_dtype).exp_()
            tile.fill_excluded(exp_RC, 0.0)
            yield tile, exp_RC


class Gradients:
    """Gradients with respect to both sides, before the scale, from pieces of d loss / d logit."""

    def __init__(self, anchor_BD: torch.Tensor, positive_GD: torch.Tensor) -> None:
        self._anchor_BD, self._positive_GD = anchor_BD, positive_GD
        self._grad_anchor_BD, self._grad_positive_GD = torch.zeros_like(anchor_BD), torch.zeros_like(positive_GD)

    def add_tile(self, tile: Tile, grad_RC: torch.Tensor) -> None:
        """Adds what the logits of a tile contribute."""
        rows, columns = tile.rows.span, tile.columns.span
        self._grad_anchor_BD[rows].addmm_(grad_RC, self._positive_GD[columns])
        self._grad_positive_GD[columns].addmm_(grad_RC.T, self._anchor_BD[rows])

    def add_positives(self, column_B: torch.Tensor, grad_B: torch.Tensor) -> None:
        """Adds what the logits of the own positives contribute."""
        grad_B1 = grad_B[:, None].to(self._anchor_BD.dtype)
        self._grad_anchor_BD.addcmul_(grad_B1, self._positive_GD[column_B])
        self._grad_positive_GD.index_add_(0, column_B, grad_B1 * self._anchor_BD)

    def of_inputs(self, scale: torch.Tensor, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of anchors (B, D), positives (G, D) and scale, times the gradient that reaches the loss."""
        # d logit_ij / d scale = anchor_i . positive_j, so its gradient is the sum over i of anchor_i . grad_anchor_i.
        grad_scale = torch.linalg.vecdot(self._anchor_BD.double(), self._grad_anchor_BD.double()).sum()
        factor = (scale * upstream).to(self._anchor_BD.dtype)
        return (
            self._grad_anchor_BD * factor,
            self._grad_positive_GD * factor,
            (grad_scale * upstream).to(scale.dtype),
        )
