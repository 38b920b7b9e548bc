"""Ranking metrics: over a pool of users (can a user's second view be found?), and over the classes of a task.

Tie rule: candidates with equal scores are taken in random order, and the expectation over that order is reported; so a
constant scorer gets a recall at k of k / P, and no metric depends on the order of the pool or of the classes.

Legend: `P` users of the pool; scores_PP[i, j] compares the anchor of user i with the positive of user j. `N` samples of
a task, `C` its classes.
"""

import numpy as np

CUTOFFS = (1, 10)
METRIC_CUTOFFS = {"mrr_at_5": 5, "accuracy": 1}  # of a task's metric, the last rank that counts
RANKED_AT_ONCE = 1 << 22  # logits that are compared at once: a few MiB beside the logits themselves


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
    return hit_rates(num_better_P, num_equal_P, k)


def bootstrap_interval(values_P: np.ndarray, num_resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of a mean over resampled users; the pool of candidates stays fixed."""
    means = np.random.default_rng(seed).choice(values_P, size=(num_resamples, len(values_P))).mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def class_ranks(logits_NC: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each sample's right class stands among all classes.

    Args:
        logits_NC: scores of all classes, of any number of samples: of a large task, a part at a time.
        labels_N: the right class of each sample, in [0, C).

    Returns:
        Classes that score higher than the right one, and classes that score the same (itself included, so >= 1), each
        int64 (N,). The rank is anywhere in [higher + 1, higher + same].

    Raises:
        ValueError: a logit is not finite, or shapes or labels do not fit.
    """
    num_samples, num_classes = logits_NC.shape
    if labels_N.shape != (num_samples,) or not ((labels_N >= 0) & (labels_N < num_classes)).all():
        raise ValueError(f"labels {labels_N.shape} of logits {logits_NC.shape}: one in [0, {num_classes}) per sample")
    num_higher_N, num_same_N = np.empty((2, num_samples), dtype=np.int64)
    size = max(1, RANKED_AT_ONCE // num_classes)
    for start in range(0, num_samples, size):
        part = slice(start, start + size)
        logits = logits_NC[part]
        if not np.isfinite(logits).all():
            raise ValueError(
                f"logits of samples {start} to {start + len(logits) - 1} are not finite: the model has diverged"
            )
        own = np.take_along_axis(logits, labels_N[part, None], axis=1)
        num_higher_N[part] = (logits > own).sum(axis=1)
        num_same_N[part] = (logits == own).sum(axis=1)
    return num_higher_N, num_same_N


def hit_rates(num_higher_N: np.ndarray, num_same_N: np.ndarray, k: int) -> np.ndarray:
    """Probability that each sample's right class is among the k best, over a random order of ties; float64 (N,).

    Args:
        num_higher_N: from `class_ranks`.
        num_same_N: likewise.
        k: last rank that counts, >= 1.
    """
    return np.clip((k - num_higher_N) / num_same_N, 0, 1)


def reciprocal_ranks(num_higher_N: np.ndarray, num_same_N: np.ndarray, k: int) -> np.ndarray:
    """Expected 1 / rank of each sample, 0 where the rank is beyond k; float64 (N,), in [0, 1]. With k = 1, the hits.

    Source: arXiv 2306.01792, MRR@5 over all classes of a task. Differs: ties; the official code
    (Sein-Kim/TERACON@b48e074:utils.py) takes them as `torch.topk` happens to order them.

    Args:
        num_higher_N: from `class_ranks`.
        num_same_N: likewise.
        k: last rank that counts, >= 1.
    """
    return _expected_gains(num_higher_N, num_same_N, 1 / np.arange(1, k + 1))


def discounted_gains(num_higher_N: np.ndarray, num_same_N: np.ndarray, k: int) -> np.ndarray:
    """Expected NDCG at k of each sample, which has one right class: 1 / log2(1 + rank), 0 beyond k; float64 (N,).

    Args:
        num_higher_N: from `class_ranks`.
        num_same_N: likewise.
        k: last rank that counts, >= 1.
    """
    return _expected_gains(num_higher_N, num_same_N, 1 / np.log2(1 + np.arange(1, k + 1)))


def _expected_gains(num_higher_N: np.ndarray, num_same_N: np.ndarray, gain_k: np.ndarray) -> np.ndarray:
    """Mean gain of each sample over the ranks that it can have; ranks beyond the gains have none."""
    summed = np.concatenate([[0.0], np.cumsum(gain_k)])
    first, last = np.minimum(num_higher_N, len(gain_k)), np.minimum(num_higher_N + num_same_N, len(gain_k))
    return (summed[last] - summed[first]) / num_same_N


def mrr_at_k(num_higher_N: np.ndarray, num_same_N: np.ndarray, k: int = 5) -> float:
    """Mean of `reciprocal_ranks` over all samples; with k = 1 this is accuracy.

    Raises:
        ValueError: there is no sample.
    """
    if not len(num_higher_N):
        raise ValueError("no sample to rank: MRR and accuracy need at least one")
    return float(reciprocal_ranks(num_higher_N, num_same_N, k).mean())
