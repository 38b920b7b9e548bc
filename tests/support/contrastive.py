"""Losses by the book: the whole matrix, in float64, differentiated by autograd."""

import torch
import torch.nn.functional as F


def excluded(keys: tuple[torch.Tensor, ...], groups: torch.Tensor) -> torch.Tensor:
    """Pairs (G, G) that are neither a positive nor a negative."""
    mask = groups[:, None] != groups
    for key in keys:
        mask |= key[:, None] == key
    return mask & ~torch.eye(len(groups), dtype=torch.bool)


def group_mean(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """Mean over the groups of the mean over a group's rows."""
    return torch.stack([values[groups == group].mean() for group in groups.unique()]).mean()


def info_nce_oracle(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    groups: torch.Tensor,
) -> torch.Tensor:
    logits = (log_scale.exp() * anchor @ positive.T).masked_fill(excluded(keys, groups), -torch.inf)
    target = torch.arange(len(anchor))
    both = F.cross_entropy(logits, target, reduction="none") + F.cross_entropy(logits.T, target, reduction="none")
    return group_mean(both / 2, groups)


def one_direction_oracle(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    log_scale: torch.Tensor,
    column_bias: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    groups: torch.Tensor,
) -> torch.Tensor:
    """Anchors choose among positives, whose logits have a bias (G,)."""
    logits = (log_scale.exp() * anchor @ positive.T + column_bias).masked_fill(excluded(keys, groups), -torch.inf)
    return group_mean(F.cross_entropy(logits, torch.arange(len(anchor)), reduction="none"), groups)


def sigmoid_oracle(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    log_scale: torch.Tensor,
    bias: torch.Tensor,
    keys: tuple[torch.Tensor, ...],
    groups: torch.Tensor,
) -> torch.Tensor:
    logits = log_scale.exp() * anchor @ positive.T + bias
    sign = 2 * torch.eye(len(anchor), dtype=anchor.dtype) - 1
    terms = -F.logsigmoid(sign * logits).masked_fill(excluded(keys, groups), 0.0)
    return group_mean(terms.sum(dim=1), groups)
