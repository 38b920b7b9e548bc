"""Contrastive losses between two views of each sample, over the samples of all workers, in tiles.

The matrix of similarities is never stored: the forward pass adds up its tiles, the backward pass computes them again.
A worker computes its own anchors against the positives of all workers; sums over a column are added up over the
workers (G numbers). Extra memory is O(G D + tile_size^2). Both losses return this worker's part, scaled so that the
mean over workers is the loss of the global batch; gradients follow the convention of `losses/gather.py`.

Positives are kept out of the tiles and computed in float64 with all other vectors of length B or G; the tiles are
float32, or float64 where the inputs are, whatever autocast says.

Legend: `B` samples on this worker, `G` samples on all workers, `D` width, `R` and `C` rows and columns of a tile.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from userrep.losses.gather import all_gather, sum_over_ranks
from userrep.losses.negatives import Negatives
from userrep.losses.tiles import Gradients, Tiles

MAX_LOGIT_SCALE = 100.0  # CLIP's clip: keeps the temperature >= 0.01
MAX_BIAS_SPREAD = 500.0  # between the biases of two columns; exp(-500 - 100) is a normal float64 number
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
    is_symmetric: bool = True,
    column_bias_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """(CE(anchor -> positives) + CE(positive -> anchors)) / 2, mean over the rows of a group, mean over groups.

    Source: Radford et al. 2021 (arXiv 2103.00020, figure 3), as CLUE (arXiv 2111.11294) uses it; CE(anchor ->
    positives) alone: Yao et al. 2021 (arXiv 2007.12865, equations 3 and 6); the bias: Yi et al. 2019 (RecSys,
    "Sampling-bias-corrected neural modeling", equation 3 on).
    Differs: `negatives` may leave pairs out; the clip of the temperature acts on its logarithm.

    Args:
        anchor_BD: L2-normalised views; B may differ between workers.
        positive_BD: L2-normalised other views of the same users.
        logit_scale: scalar log of the inverse temperature; used as min(exp(logit_scale), 100).
        negatives: which pairs are contrasted.
        tile_size: rows and columns of a tile, >= 1; of no influence but on speed and memory.
        is_symmetric: whether positives choose among anchors too; otherwise the loss is CE(anchor -> positives).
        column_bias_B: added to the logits of each positive with every anchor, the own one included; a constant without
            gradient: -log p for positives that are drawn with probability p. CE(positive -> anchors) does not depend
            on it. Default: none.

    Returns:
        Scalar loss >= 0, float32 (float64 for float64 inputs); log(G) for representations that say nothing. Its
        gradient is exact where all workers pass the same gradient to it.

    Raises:
        ValueError: positives lack a bias, or a bias is not finite, or two are more than 500 apart.
    """
    bias_G = None if column_bias_B is None else _gather_bias(column_bias_B, negatives)
    scale = clamp_logit_scale(logit_scale)
    return _run(_InfoNCE, anchor_BD, positive_BD, (scale,), negatives, tile_size, is_symmetric, bias_G)


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


def _gather_bias(bias_B: torch.Tensor, negatives: Negatives) -> torch.Tensor:
    """Biases of the sorted columns less the largest one, which no softmax over a row sees: float64 (G,), <= 0."""
    if bias_B.shape != negatives.row_order.shape:
        raise ValueError(
            f"column bias {tuple(bias_B.shape)} of {len(negatives.row_order)} positives: give each its one"
        )
    bias_G = all_gather(bias_B.detach().double(), negatives.sizes)[negatives.column_order]
    low, high = bias_G.min(), bias_G.max()
    if not high - low <= MAX_BIAS_SPREAD:  # nor is it so where one is not finite
        raise ValueError(
            f"column biases from {float(low)} to {float(high)}: at most {MAX_BIAS_SPREAD} apart (-log p needs p > 0)"
        )
    return bias_G - high


def _run(
    loss: type[torch.autograd.Function],
    anchor_BD: torch.Tensor,
    positive_BD: torch.Tensor,
    scalars: tuple[torch.Tensor, ...],
    negatives: Negatives,
    tile_size: int,
    *options: Any,
) -> torch.Tensor:
    dtype = torch.float64 if anchor_BD.dtype == torch.float64 else torch.float32
    with torch.autocast(anchor_BD.device.type, enabled=False):
        anchor_BD, positive_GD = anchor_BD.to(dtype), all_gather(positive_BD.to(dtype), negatives.sizes)
        if negatives.num_groups > 1:
            anchor_BD, positive_GD = anchor_BD[negatives.row_order], positive_GD[negatives.column_order]
        return loss.apply(anchor_BD, positive_GD, *scalars, negatives, tile_size, *options)


class _InfoNCE(torch.autograd.Function):
    """A column's bias b enters the sums of rows alone, as the factor exp(b) of what the column adds to them."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor_BD: torch.Tensor,
        positive_GD: torch.Tensor,
        scale: torch.Tensor,
        negatives: Negatives,
        tile_size: int,
        is_symmetric: bool,
        bias_G: torch.Tensor | None,
    ) -> torch.Tensor:
        column_B = negatives.positives_B()
        logit_B = _positive_logits(anchor_BD, positive_GD, column_B, scale)
        row_total_B, column_total_G = logit_B.exp(), logit_B.new_zeros(len(positive_GD))
        column_total_G[column_B] = row_total_B
        if bias_G is not None:
            row_total_B = row_total_B * bias_G[column_B].exp()
        tiles = Tiles(anchor_BD, positive_GD, float(scale), negatives, tile_size, bias_G)
        for tile, exp_RC in tiles.exponentials():
            if bias_G is None:
                row_total_B[tile.rows.span] += exp_RC.sum(dim=1)
            else:
                row_total_B[tile.rows.span] += exp_RC @ tiles.factor_G[tile.columns.span]
            if is_symmetric:
                column_total_G[tile.columns.span] += exp_RC.sum(dim=0)
        loss_B = row_total_B.log() if bias_G is None else row_total_B.log() - bias_G[column_B]
        if is_symmetric:
            sum_over_ranks(column_total_G)
            loss_B = (loss_B + column_total_G[column_B].log()) / 2
        ctx.save_for_backward(anchor_BD, positive_GD, scale, logit_B, row_total_B, column_total_G, bias_G)
        ctx.negatives, ctx.tile_size, ctx.is_symmetric = negatives, tile_size, is_symmetric
        return (negatives.weights()[0] * (loss_B - logit_B)).sum().to(anchor_BD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        anchor_BD, positive_GD, scale, logit_B, row_total_B, column_total_G, bias_G = ctx.saved_tensors
        row_weight_B, column_weight_G = ctx.negatives.weights()
        num_directions = 1 + ctx.is_symmetric
        row_B = row_weight_B / row_total_B / num_directions
        column_G = column_weight_G / column_total_G / 2 if ctx.is_symmetric else torch.zeros_like(column_weight_G)
        column_B = ctx.negatives.positives_B()
        own_row_B = row_B if bias_G is None else row_B * bias_G[column_B].exp()
        gradients = Gradients(anchor_BD, positive_GD)
        gradients.add_positives(column_B, logit_B.exp() * (own_row_B + column_G[column_B]) - row_weight_B)
        tiles = Tiles(anchor_BD, positive_GD, float(scale), ctx.negatives, ctx.tile_size, bias_G)
        # d loss / d logit is exp(logit) (row exp(bias) + column): one exponential serves both directions.
        row_B, column_G = row_B.to(tiles.exp_dtype), column_G.to(tiles.exp_dtype)
        factor = torch.empty(tiles.size**2, dtype=tiles.exp_dtype, device=scale.device)
        for tile, exp_RC in tiles.exponentials():
            factor_RC, row_R1 = factor[: exp_RC.numel()].view_as(exp_RC), row_B[tile.rows.span, None]
            if bias_G is not None:
                column_C = column_G[tile.columns.span]
                torch.addcmul(column_C, row_R1, tiles.factor_G[tile.columns.span], out=factor_RC)
            elif ctx.is_symmetric:
                torch.add(row_R1, column_G[tile.columns.span], out=factor_RC)
            else:
                factor_RC = row_R1
            gradients.add_tile(tile, exp_RC.mul_(factor_RC).to(anchor_BD.dtype))
        return *gradients.of_inputs(scale, grads[0]), None, None, None, None


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
        loss_B, gradients = F.softplus(-logit_B), Gradients(anchor_BD, positive_GD)
        grad_B = -weight_B * torch.sigmoid(-logit_B)
        gradients.add_positives(column_B, grad_B)
        row_weight_B, grad_bias = weight_B.to(anchor_BD.dtype), grad_B.sum()
        for tile, logits_RC in Tiles(anchor_BD, positive_GD, float(scale), negatives, tile_size).logits():
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
