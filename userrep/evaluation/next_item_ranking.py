"""Next-item recommendation: where the right item stands among all items of the catalogue, of every user.

All items are candidates, those of the user's history too. Ties as in `ranking.py`: the expectation over a random order.

Source: arXiv 2305.13731, NDCG@10, Recall@10 and MRR of the full ranking. Differs: the official code
(AaronHeee/RecFormer@26b00a5) counts ties in favour of the right item.

Legend: `N` users, `I` items.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from userrep.evaluation.ranking import bootstrap_interval, class_ranks, discounted_gains, hit_rates, reciprocal_ranks

CUTOFF = 10
USERS_AT_ONCE = 512
METRICS = ("ndcg_at_10", "recall_at_10", "mrr")


@dataclass(frozen=True)
class NextItemRanks:
    """Ranks of the right items, from `rank_next_items`.

    Attributes:
        num_higher: items that score higher than the right one, int64 (N,).
        num_same: items that score the same, itself included, int64 (N,).
        num_items: size of the catalogue I.
    """

    num_higher: np.ndarray
    num_same: np.ndarray
    num_items: int

    def values(self) -> dict[str, np.ndarray]:
        """Every user's NDCG at 10, recall at 10 and reciprocal rank (without a cutoff), float64 (N,) in [0, 1].

        Means of them are the metrics; differences of two systems user by user, their paired comparison.
        """
        ranks = self.num_higher, self.num_same
        parts = (discounted_gains(*ranks, CUTOFF), hit_rates(*ranks, CUTOFF), reciprocal_ranks(*ranks, self.num_items))
        return dict(zip(METRICS, parts, strict=True))


def rank_next_items(
    scores: Callable[[int, int], np.ndarray], targets_N: np.ndarray, users_at_once: int = USERS_AT_ONCE
) -> NextItemRanks:
    """Ranks every user's right item, with the scores of `users_at_once` users in memory.

    Args:
        scores: of users [start, stop), a row over all items each, (stop - start, I).
        targets_N: right item of each user, in [0, I).
        users_at_once: >= 1.

    Raises:
        ValueError: there is no user, a score is not finite, or shapes or targets do not fit.
    """
    if not len(targets_N):
        raise ValueError("no user to rank items for: leave-one-out needs users with at least three events")
    parts, num_items = [], 0
    for start in range(0, len(targets_N), users_at_once):
        stop = min(start + users_at_once, len(targets_N))
        rows = scores(start, stop)
        num_items = rows.shape[1]
        parts.append(class_ranks(rows, targets_N[start:stop]))
    num_higher, num_same = (np.concatenate(part) for part in zip(*parts, strict=True))
    return NextItemRanks(num_higher, num_same, num_items)


def summarize(
    values: Mapping[str, np.ndarray], slices: Mapping[str, np.ndarray] | None = None
) -> dict[str, dict[str, Any]]:
    """Means over all users and over slices of them, with 95% bootstrap intervals over users.

    Args:
        values: by metric, of every user, from `NextItemRanks.values`.
        slices: by name, which users are in it, bool (N,), e.g. from `LeaveOneOut.is_cold`.

    Returns:
        By slice, `all` among them: `num_users`, and by metric `mean`, `low`, `high`, unless the slice is empty.
    """
    num_users = len(next(iter(values.values())))
    found: dict[str, dict[str, Any]] = {}
    for name, is_in in {"all": np.ones(num_users, dtype=bool), **(slices or {})}.items():
        found[name] = {"num_users": int(is_in.sum())}
        for metric, of_user in values.items() if is_in.any() else ():
            low, high = bootstrap_interval(of_user[is_in])
            found[name][metric] = {"mean": float(of_user[is_in].mean()), "low": low, "high": high}
    return found


def paired_differences(own: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """By metric, the mean of own value minus the other's, user by user, with its 95% bootstrap interval.

    Args:
        own: by metric, of every user.
        other: of the same users in the same order.

    Raises:
        ValueError: the numbers of users differ.
    """
    found = {}
    for metric, of_user in own.items():
        if of_user.shape != other[metric].shape:
            raise ValueError(
                f"{metric} of {len(of_user)} users against {len(other[metric])}: a paired difference is of the same "
                "users in the same order"
            )
        difference = of_user - other[metric]
        low, high = bootstrap_interval(difference)
        found[metric] = {"mean": float(difference.mean()), "low": low, "high": high}
    return found
