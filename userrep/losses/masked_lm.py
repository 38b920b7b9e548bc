"""Cross-entropy of masked tokens over a large vocabulary, of which only a few rows of logits exist at a time.

Legend: `M` masked tokens, `V` vocabulary, `D` width.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 32 * 2**20  # of logits that exist at a time, in float32


def linear_cross_entropy(
    feature_MD: torch.Tensor,
    matrix_VD: torch.Tensor,
    bias_V: torch.Tensor,
    labels_M: torch.Tensor,
    weight_M: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over rows of -log softmax(feature @ matrix.T + bias)[label].

    The forward pass computes the gradients too, chunk by chunk, so logits are made once and never kept. Products are of
    autocast's precision, softmax and sums of float32 at least.

    Source: as Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2). Differs: in plain torch.

    Args:
        feature_MD: what the output matrix is applied to; M may be 0.
        matrix_VD: output matrix; a constant one costs no gradient.
        bias_V: output bias.
        labels_M: the tokens, int64.
        weight_M: of each row; without gradient.

    Returns:
        The sum, scalar float32 (float64 for float64 inputs), whose gradient may be taken once; and the rows' losses
        without their weights (M,), without gradient.
    """
    return _LinearCrossEntropy.apply(feature_MD, matrix_VD, bias_V, labels_M, weight_M, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feature_MD: torch.Tensor,
        matrix_VD: torch.Tensor,
        bias_V: torch.Tensor,
        labels_M: torch.Tensor,
        weight_M: torch.Tensor,
        with_gradients: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        device = feature_MD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix_VD.dtype
        with torch.autocast(device, enabled=False):
            feature, matrix = feature_MD.to(dtype), matrix_VD.to(dtype)
            bias_V = bias_V.to(torch.promote_types(dtype, torch.float32))
            weight_M, loss_M = weight_M.to(bias_V.dtype), bias_V.new_empty(len(labels_M))
            has_matrix = ctx.needs_input_grad[1]
            gradients = _Gradients(feature_MD, matrix_VD, bias_V, has_matrix) if with_gradients else None
            num_rows = max(1, CHUNK_BYTES // (4 * len(bias_V)))
            for start in range(0, len(labels_M), num_rows):
                rows = slice(start, start + num_rows)
                label_m1 = labels_M[rows, None]
                logits_mV = (feature[rows] @ matrix.T).to(bias_V.dtype).add_(bias_V)
                high_m1, of_label_m1 = logits_mV.amax(dim=1, keepdim=True), logits_mV.gather(1, label_m1)
                exp_mV = logits_mV.sub_(high_m1).exp_()
                total_m1 = exp_mV.sum(dim=1, keepdim=True)
                loss_M[rows] = (total_m1.log() + high_m1 - of_label_m1)[:, 0]
                if gradients is not None:
                    grad_mV = exp_mV.mul_(weight_M[rows, None] / total_m1)
                    grad_mV.scatter_add_(1, label_m1, -weight_M[rows, None])
                    gradients.add(rows, grad_mV, feature, matrix)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(loss_M)
        return (weight_M * loss_M).sum(), loss_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        # Scaled in place and given away: that of the matrix is the largest tensor of a step.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the gradient of linear_cross_entropy was taken before"
        scaled = (gradients.feature_MD, gradients.matrix_VD, gradients.bias_V)
        return *(None if one is None else one.mul_(grads[0]) for one in scaled), None, None, None


class _Gradients:
    """Of the sum with respect to features, matrix and bias, from pieces of d sum / d logits."""

    def __init__(
        self, feature_MD: torch.Tensor, matrix_VD: torch.Tensor, bias_V: torch.Tensor, has_matrix: bool
    ) -> None:
        self.feature_MD, self.bias_V = torch.empty_like(feature_MD), torch.zeros_like(bias_V)
        # That of a constant matrix would be a third of all operations.
        self.matrix_VD = torch.zeros_like(matrix_VD) if has_matrix else None

    def add(self, rows: slice, grad_mV: torch.Tensor, feature: torch.Tensor, matrix: torch.Tensor) -> None:
        """Adds what some rows contribute; feature and matrix are what the logits were made of."""
        self.bias_V += grad_mV.sum(dim=0)
        grad_mV = grad_mV.to(matrix.dtype)
        self.feature_MD[rows] = (grad_mV @ matrix).to(self.feature_MD.dtype)
        if self.matrix_VD is None:
            return
        if matrix.dtype == self.matrix_VD.dtype:
            self.matrix_VD.addmm_(grad_mV.T, feature[rows])
        else:
            self.matrix_VD += grad_mV.T @ feature[rows]
