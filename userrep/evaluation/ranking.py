"""Retrieval metrics over a pool: can a user's second view be found among those of all users of the pool?

Tie rule: candidates with equal scores are taken in random order, and the expectation over that order is reported; so a
constant scorer gets k / P, and no metric depends on the order of the pool.

Legend: `P` users of the pool; scores_PP[i, j] compares the anchor of user i with the positive of user j.
"""

import numpy as np

CUTOFFS = (1, 10)


def retrieval_metrics(scores_PP: np.ndarray, backward_PP: np.ndarray | None = None) -> dict[str, float]:
    """Recall at 1 and 10, the mean of both directions, with a 95% bootstrap interval over users for recall at 10.

    Args:
        scores_PP: row i ranks all positives for the anchor of user i.
        backward_PP: row i ranks all anchors for the positive of user i; default: the transpose of `scores_PP`.

    Raises:
        ValueError: a score is not finite.
    """
    directions = (scores_PP, scores_PP.T if backward_PP is None else backward_PP)
    if not all(np.isfinite(scores).all() for scores in directions):
        raise ValueError("retrieval scores are not finite: the encoder has diverged, or a baseline met unseen data")
    hits = {k: np.mean([expected_hits(scores, k) for scores in directions], axis=0) for k in CUTOFFS}
    low, high = bootstrap_interval(hits[10])
    return {f"recall_at_{k}": float(hit_P.mean()) for k, hit_P in hits.items()} | {
        "recall_at_10_low": low,
        "recall_at_10_high": high,
    }


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
