"""Knowledge retention of TERACON: past tasks are rehearsed on the new task's users, with a frozen teacher's answers.

Source: Kim et al., KDD 2023, Eq. 15 and the retention loss; Sein-Kim/TERACON@b48e074:train_teracon.py.
"""

import torch
import torch.nn.functional as F

RELATION_SCALE = 6.0  # c of Eq. 15


def sampling_rate(current_KD: torch.Tensor, past_KD: torch.Tensor) -> torch.Tensor:
    """Share of the users on which a past task is rehearsed: the less its masks resemble the new ones, the more.

    rho = 1 - mean over mask points of sigmoid(c cos(current, past)). Masks are positive, so it is in [0.0025, 0.5).

    Args:
        current_KD: masks of the new task.
        past_KD: masks of the past task, as its teacher has them.
    """
    with torch.no_grad():
        cosine_K = F.cosine_similarity(current_KD, past_KD, dim=1, eps=1e-6)
        return 1 - torch.sigmoid(RELATION_SCALE * cosine_K).mean()


def retention_loss(errors_M: torch.Tensor, rates_M: torch.Tensor) -> torch.Tensor:
    """Mean of the past tasks' errors, weighted by their sampling rates.

    Args:
        errors_M: mean squared error between logits of student and teacher, over the sampled users and all classes.
        rates_M: the rates by which they were sampled.
    """
    return (rates_M / rates_M.sum() * errors_M).sum()
