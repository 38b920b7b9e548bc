"""Retrieval metrics over a pool: can a user's second view be found among those of all users of the pool?

Tie rule: candidates with equal scores are taken in random order, and the expectation over that order is reported; so a
constant scorer gets k / P, and no metric depends on the order of the pool.

Legend: `P` users of the pool; scores_PP[i, j] compares the anchor of user i with the positive of user j.
"""

import numpy as np

CUTOFFS = (1, 10)


def retrieval_hits(scores_PP: np.ndarray, backward_PP: np.ndarray | None = None) -> dict[int, np.ndarray]:
    """Expected hits of every user at 1 and at 10, (P,) each: the mean of both directions.

    Args:
        scores_PP: row i ranks all positives for the anchor of user i.
        backward_PP: row i ranks all anchors for the positive of user i; default: the transpose of `scores_PP`.

    Raises:
        ValueError: a score is not finite.
    """
    directions = (scores_PP, scores_PP.T if backward_PP is None else backward_PP)
    if not all(np.isfinite(scores).all() for scores in directions):
        raise ValueError("retrieval scores are not finite: the encoder has diverged, or a baseline met unseen data")
    return {k: np.mean([expected_hits(scores, k) for scores in directions], axis=0) for k in CUTOFFS}


def compare_retrieval(hits: dict[str, dict[int, np.ndarray]], own: str) -> dict[str, dict[str, float]]:
    """Recall at 1 and 10 of several systems on the same users, with 95% bootstrap intervals over users.

    Args:
        hits: of every system, from `retrieval_hits`.
        own: the system that the others are compared with.

    Returns:
        By system `recall_at_1`, `recall_at_10`, `recall_at_10_low`, `recall_at_10_high`; for all but `own` also
        `lead_low` and `lead_high`, the interval of own recall at 10 minus theirs, user by user.
    """
    results: dict[str, dict[str, float]] = {}
    for name, hits_at in hits.items():
        low, high = bootstrap_interval(hits_at[10])
        results[name] = {f"recall_at_{k}": float(hit_P.mean()) for k, hit_P in hits_at.items()}
        results[name] |= {"recall_at_10_low": low, "recall_at_10_high": high}
        if name != own:
            lead_low, lead_high = bootstrap_interval(hits[own][10] - hits_at[10])
            results[name] |= {"lead_low": lead_low, "lead_high": lead_high}
    return results


def expected_hits(scores_PP: np.ndarray, k: int) -> np.ndarray:
    """Probability, over a random order of ties, that a user's own candidate is among the k best of its row. (P,)."""
    own_P = np.diagonal(scores_PP)[:, None]
    num_better_P = (scores_PP > own_P).sum(axis=1)
    num_equal_P = (scores_PP == own_P).sum(axis=1)  # includes the candidate itself
    return np.clip((k - num_better_P) / num_equal_P, 0, 1)


def bootstrap_interval(values_P: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of a mean over resampled users; the pool of candidates stays fixed."""
    means = np.random.default_rng(seed).choice(values_P, size=(num_resamples, len(values_P))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
