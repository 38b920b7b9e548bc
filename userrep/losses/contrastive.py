"""Symmetric InfoNCE between two views of each user, over the users of all workers.

Legend: `B` users on this worker, `G` users on all workers, `D` width.
Source: Radford et al. 2021 (arXiv 2103.00020, figure 3), as CLUE (arXiv 2111.11294) uses it.
Differs: further rows of the same user are no negatives (a user may offer several pairs of views).
"""

import torch
import torch.nn.functional as F

from userrep.losses.gather import all_gather, rank

MAX_LOGIT_SCALE = 100.0  # CLIP's clip: keeps the temperature >= 0.01


def clip_loss(
    anchor_BD: torch.Tensor, positive_BD: torch.Tensor, logit_scale: torch.Tensor, user_keys_B: torch.Tensor
) -> torch.Tensor:
    """Mean over this worker's users of (CE(anchor -> positives) + CE(positive -> anchors)) / 2.

    The mean over ranks is the loss of the whole global batch; the gradient convention is that of `losses/gather.py`.

    Args:
        anchor_BD: L2-normalised views, the same B on every rank.
        positive_BD: L2-normalised other views of the same users.
        logit_scale: scalar log of the inverse temperature; used as min(exp(logit_scale), 100).
        user_keys_B: int64 keys; equal keys are the same user.

    Returns:
        Scalar loss, >= 0; log(G) for representations that say nothing.
    """
    scale = logit_scale.exp().clamp(max=MAX_LOGIT_SCALE)
    anchor_GD, positive_GD = all_gather(anchor_BD), all_gather(positive_BD)
    keys_G = all_gather(user_keys_B)
    first = rank() * len(anchor_BD)
    target_B = torch.arange(first, first + len(anchor_BD), device=anchor_BD.device)

    is_same_BG = user_keys_B[:, None] == keys_G[None, :]
    is_same_BG[torch.arange(len(target_B), device=target_B.device), target_B] = False  # the positive itself stays
    logits_BG = (scale * anchor_BD @ positive_GD.T).masked_fill(is_same_BG, -torch.inf)
    logits_of_positive_BG = (scale * positive_BD @ anchor_GD.T).masked_fill(is_same_BG, -torch.inf)
    return (F.cross_entropy(logits_BG, target_B) + F.cross_entropy(logits_of_positive_BG, target_B)) / 2
