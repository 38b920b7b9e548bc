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
) -> torch.Tensor:
    """Sum over rows of weight * -log softmax(feature @ matrix.T + bias)[label], scalar float32 (float64 for float64).

    The forward pass computes the gradients too, chunk by chunk, so logits are made once and never kept. Products are of
    autocast's precision, softmax and sums of float32 at least.

    Source: as Liger Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2). Differs: in plain torch.

    Args:
        feature_MD: what the output matrix is applied to; M may be 0.
        matrix_VD: output matrix.
        bias_V: output bias.
        labels_M: the tokens, int64.
        weight_M: of each row; without gradient.
    """
    return _LinearCrossEntropy.apply(feature_MD, matrix_VD, bias_V, labels_M, weight_M)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        feature_MD: torch.Tensor,
        matrix_VD: torch.Tensor,
        bias_V: torch.Tensor,
        labels_M: torch.Tensor,
        weight_M: torch.Tensor,
    ) -> torch.Tensor:
        device = feature_MD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else matrix_VD.dtype
        wide = torch.promote_types(dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            feature, matrix, bias, weight_M = (
                feature_MD.to(dtype),
                matrix_VD.to(dtype),
                bias_V.to(wide),
                weight_M.to(wide),
            )
            grad_feature, grad_bias = torch.empty_like(feature_MD), torch.zeros_like(bias)
            grad_matrix = torch.zeros_like(matrix_VD)
            loss, num_rows = bias.new_zeros(()), max(1, CHUNK_BYTES // (4 * len(bias)))
            for start in range(0, len(labels_M), num_rows):
                rows = slice(start, start + num_rows)
                label_m, weight_m1 = labels_M[rows, None], weight_M[rows, None]
                logits_mV = (feature[rows] @ matrix.T).to(wide).add_(bias)
                total_m1 = logits_mV.logsumexp(dim=1, keepdim=True)
                loss += (weight_m1 * (total_m1 - logits_mV.gather(1, label_m))).sum()
                grad_mV = logits_mV.sub_(total_m1).exp_().mul_(weight_m1)
                grad_mV.scatter_add_(1, label_m, -weight_m1)
                grad_bias += grad_mV.sum(dim=0)
                grad_mV = grad_mV.to(dtype)
                grad_feature[rows] = (grad_mV @ matrix).to(grad_feature.dtype)
                if dtype == grad_matrix.dtype:
                    grad_matrix.addmm_(grad_mV.T, feature[rows])
                else:
                    grad_matrix += grad_mV.T @ feature[rows]
        ctx.save_for_backward(grad_feature, grad_matrix, grad_bias.to(bias_V.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # pyright: ignore
        grad_feature, grad_matrix, grad_bias = ctx.saved_tensors
        upstream = grads[0]
        # In place where nobody else holds it: the matrix is the largest tensor of a step.
        return grad_feature * upstream, grad_matrix.mul_(upstream), grad_bias * upstream, None, None
