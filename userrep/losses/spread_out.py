"""Regularisers that spread vectors over the sphere, over the vectors of all workers.

Both return this worker's part of the mean over the global batch; gradients follow the convention of `losses/gather.py`.

Legend: `B` vectors on this worker, `G` vectors on all workers, `D` width.
"""

import torch

from userrep.losses.contrastive import TILE_SIZE, info_nce
from userrep.losses.gather import all_gather
from userrep.losses.negatives import Negatives


def spread_out_softmax(
    vectors_BD: torch.Tensor, logit_scale: torch.Tensor, negatives: Negatives, tile_size: int = TILE_SIZE
) -> torch.Tensor:
    """Cross-entropy of finding a vector itself among all of the batch; the gradient passes through both sides.

    Source: Yao et al. 2021 (arXiv 2007.12865, section 3), the self-supervised loss without augmentation.
    Differs: `negatives` may leave pairs out, which keeps one item, drawn twice, from being pushed away from itself.

    Args:
        vectors_BD: L2-normalised; B may differ between workers.
        logit_scale: as in `info_nce`.
        negatives: as in `info_nce`.
        tile_size: as in `info_nce`.

    Returns:
        Scalar loss >= 0; log(G) where all vectors are equal.
    """
    return info_nce(vectors_BD, vectors_BD, logit_scale, negatives, tile_size, is_symmetric=False)


def global_orthogonal(vectors_BD: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    """M1^2 + max(0, M2 - 1/D): M1 and M2 are the mean cosine of two vectors and the mean of its square.

    Vectors that are uniform on the sphere have M1 = 0 and M2 = 1/D. Both are computed from the sum of the vectors and
    the D x D sum of their outer products, so no G x G matrix exists.

    Source: GOR, Zhang et al. 2017 ("Learning spread-out local feature descriptors", ICCV; arXiv 1708.06320).
    Differs: the pairs are all pairs of different rows of one batch, where the source pairs each with a random other.

    Args:
        vectors_BD: L2-normalised; B may differ between workers.
        sizes: B of every worker, `Negatives.sizes`.

    Returns:
        Scalar >= 0, the same on every worker; 0 for a batch of one.
    """
    vectors_GD = all_gather(vectors_BD, sizes)
    num_rows, dim = vectors_GD.shape
    if num_rows < 2:
        return vectors_GD.sum() * 0
    num_pairs = num_rows * (num_rows - 1)
    square_G = torch.linalg.vecdot(vectors_GD, vectors_GD)
    mean = (vectors_GD.sum(dim=0).square().sum() - square_G.sum()) / num_pairs
    mean_square = ((vectors_GD.T @ vectors_GD).square().sum() - square_G.square().sum()) / num_pairs
    return mean.square() + (mean_square - 1 / dim).clamp(min=0)
