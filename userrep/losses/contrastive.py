"""Contrastive losses between two views of each user, over the users of all workers, in tiles.

The matrix of similarities is never stored: the forward pass adds up its tiles, the backward pass computes them again.
A worker computes its own anchors against the positives of all workers; sums over a column are added up over the
workers (G numbers). Extra memory is O(G D + tile_size^2). Both losses return this worker's part, scaled so that the
mean over workers is the loss of the global batch; gradients follow the convention of `losses/gather.py`.

Positives are kept out of the tiles and computed in float64 with all other vectors of length B or G; the tiles are
float32, or float64 where the inputs are, whatever autocast says.

Legend: `B` users on this worker, `G` users on all workers, `D` width, `R` and `C` rows and columns of a tile.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from userrep.losses.gather import all_gather, sum_over_ranks
from userrep.losses.negatives import Negatives, Tile

MAX_LOGIT_SCALE = 100.0  # CLIP's clip: keeps the temperature >= 0.01
# Up to this scale exp(logit) and sums of 10^6 of them, and their inverses, are normal float32 numbers without the usual
# subtraction of a maximum, so one exponential serves rows and columns; beyond it the tile's exponential is float64.
MAX_FLOAT32_SCALE = 60.0
TILE_SIZE = 512  # 1 MiB: a tile and its partner stay in the second-level cache (pipelines/records)


def clamp_logit_scale(logit_scale: torch.Tensor) -> torch.Tensor:
    """exp(logit_scale), at most `MAX_LOGIT_SCALE`; beyond the clip the gradient is zero."""
    return logit_scale.clamp(max=math.log(MAX_LOGIT_SCALE)).exp()


def info_nce(
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    negatives: Negatives,
    tile_size: int = TILE_SIZE,
) -> torch.Tensor:
    """(CE(anchor -> positives) + CE(positive -> anchors)) / 2, mean over the rows of a group, mean over groups.

    Source: Radford et al. 2021 (arXiv 2103.00020, figure 3), as CLUE (arXiv 2111.11294) uses it.
    Differs: `negatives` may leave pairs out; the clip of the temperature acts on its logarithm.

    Args:
        anchor_BD: L2-normalised views; B may differ between workers.
        positive_BD: L2-normalised other views of the same users.
        logit_scale: scalar log of the inverse temperature; used as min(exp(logit_scale), 100).
        negatives: which pairs are contrasted.
        tile_size: rows and columns of a tile, >= 1; of no influence but on speed and memory.

    Returns:
        Scalar loss >= 0, float32 (float64 for float64 inputs); log(G) for representations that say nothing. Its
        gradient is exact where all workers pass the same gradient to it.
    """
    return _run(_InfoNCE, anchor_BD, positive_BD, (clamp_logit_scale(logit_scale),), negatives, tile_size)


def sigmoid_loss(
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    negatives: Negatives,
    tile_size: int = TILE_SIZE,
) -> torch.Tensor:
    """-log sigmoid(+-logit) summed over a row's pairs, + for its positive, mean over a group's rows, mean over groups.

    Source: SigLIP, Zhai et al. 2023 (arXiv 2303.15343, equation 1 and algorithm 1). Differs: as in `info_nce`.

    Args:
        anchor_BD: as in `info_nce`.
        positive_BD: as in `info_nce`.
        logit_scale: as in `info_nce`.
        logit_bias: scalar, added to every logit.
        negatives: as in `info_nce`.
        tile_size: as in `info_nce`.

    Returns:
        As `info_nce`.
    """
    scalars = (clamp_logit_scale(logit_scale), logit_bias)
    return _run(_SigmoidLoss, anchor_BD, positive_BD, scalars, negatives, tile_size)


def _run(
    loss: type[torch.autograd.Function],
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    scalars: tuple[torch.Tensor, ...],
    negatives: Negatives,
    tile_size: int,
) -> torch.Tensor:
    dtype = torch.float64 if anchor_BD.dtype == torch.float64 else torch.float32
    with torch.autocast(anchor_BD.device.type, enabled=False):
        anchor_BD, positive_GD = anchor_BD.to(dtype), all_gather(positive_BD.to(dtype), negatives.sizes)
        if negatives.num_groups > 1:
            anchor_BD, positive_GD = anchor_BD[negatives.row_order], positive_GD[negatives.column_order]
        return loss.apply(anchor_BD, positive_GD, *scalars, negatives, tile_size)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor_BD: torch.Tensor,
        positive_GD: torch.Tensor,
        scale: torch.Tensor,
        negatives: Negatives,
        tile_size: int,
    ) -> torch.Tensor:
        column_B = negatives.positives_B()
        logit_B = _positive_logits(anchor_BD, positive_GD, column_B, scale)
        row_total_B, column_total_G = logit_B.exp(), logit_B.new_zeros(len(positive_GD))
        column_total_G[column_B] = row_total_B
        for tile, exp_RC in _Tiles(anchor_BD, positive_GD, float(scale), negatives, tile_size).exponentials():
            row_total_B[tile.rows.span] += exp_RC.sum(dim=1)
            column_total_G[tile.columns.span] += exp_RC.sum(dim=0)
        sum_over_ranks(column_total_G)
        ctx.save_for_backward(anchor_BD, positive_GD, scale, logit_B, row_total_B, column_total_G)
        ctx.negatives, ctx.tile_size = negatives, tile_size
        loss_B = (row_total_B.log() + column_total_G[column_B].log()) / 2 - logit_B
        return (negatives.weights()[0] * loss_B).sum().to(anchor_BD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        anchor_BD, positive_GD, scale, logit_B, row_total_B, column_total_G = ctx.saved_tensors
        row_weight_B, column_weight_G = ctx.negatives.weights()
        row_B, column_G = row_weight_B / row_total_B / 2, column_weight_G / column_total_G / 2
        column_B = ctx.negatives.positives_B()
        gradients = _Gradients(anchor_BD, positive_GD)
        gradients.add_positives(column_B, logit_B.exp() * (row_B + column_G[column_B]) - row_weight_B)
        tiles = _Tiles(anchor_BD, positive_GD, float(scale), ctx.negatives, ctx.tile_size)
        # d loss / d logit is exp(logit) (row + column): one exponential serves both directions.
        row_B, column_G = row_B.to(tiles.exp_dtype), column_G.to(tiles.exp_dtype)
        factor = torch.empty(tiles.size**2, dtype=tiles.exp_dtype, device=scale.device)
        for tile, exp_RC in tiles.exponentials():
            factor_RC = factor[: exp_RC.numel()].view_as(exp_RC)
            torch.add(row_B[tile.rows.span, None], column_G[tile.columns.span], out=factor_RC)
            gradients.add_tile(tile, exp_RC.mul_(factor_RC).to(anchor_BD.dtype))
        return *gradients.of_inputs(scale, grads[0]), None, None


class _SigmoidLoss(torch.autograd.Function):
    """No sum over a row enters a gradient, so the forward pass computes the gradients from the same tiles."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor_BD: torch.Tensor,
        positive_GD: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        negatives: Negatives,
        tile_size: int,
    ) -> torch.Tensor:
        column_B = negatives.positives_B()
        weight_B = negatives.weights()[0]
        logit_B = _positive_logits(anchor_BD, positive_GD, column_B, scale) + bias.double()
        loss_B, gradients = F.softplus(-logit_B), _Gradients(anchor_BD, positive_GD)
        grad_B = -weight_B * torch.sigmoid(-logit_B)
        gradients.add_positives(column_B, grad_B)
        row_weight_B, grad_bias = weight_B.to(anchor_BD.dtype), grad_B.sum()
        for tile, logits_RC in _Tiles(anchor_BD, positive_GD, float(scale), negatives, tile_size).logits():
            logits_RC += bias
            tile.fill_excluded(logits_RC, -torch.inf)
            loss_B[tile.rows.span] += F.softplus(logits_RC).sum(dim=1)
            grad_RC = logits_RC.sigmoid_().mul_(row_weight_B[tile.rows.span, None])
            grad_bias += grad_RC.sum(dtype=torch.float64)
            gradients.add_tile(tile, grad_RC)
        ctx.save_for_backward(scale, grad_bias.to(bias.dtype))
        ctx.gradients = gradients
        return (weight_B * loss_B).sum().to(anchor_BD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        scale, grad_bias = ctx.saved_tensors
        return *ctx.gradients.of_inputs(scale, grads[0]), grad_bias * grads[0], None, None


def _positive_logits(
    anchor_BD: torch.Tensor, positive_GD: torch.Tensor, column_B: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Logits of the own positives, float64 (B,)."""
    return torch.linalg.vecdot(anchor_BD.double(), positive_GD[column_B].double()) * scale.double()


class _Tiles:
    """Tiles of scale * anchor @ positive.T, one after another in the same memory."""

    def __init__(
        self, anchor_BD: torch.Tensor, positive_GD: torch.Tensor, scale: float, negatives: Negatives, size: int
    ) -> None:
        self._scaled_BD, self._positive_GD, self._negatives = anchor_BD * scale, positive_GD, negatives
        self.size = min(size, len(positive_GD))
        self.exp_dtype = torch.float64 if scale > MAX_FLOAT32_SCALE else anchor_BD.dtype

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


class _Gradients:
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
