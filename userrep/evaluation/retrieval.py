"""Retrieval of one relevant item among all items of a corpus, with no matrix of queries x corpus.

Tie rule: that of `evaluation/ranking.py`, so items with equal scores are taken in random order, and the expectation
over that order is reported.

Legend: `Q` queries, `N` items of the corpus, `D` width.
"""

from collections.abc import Sequence

import numpy as np

from userrep.evaluation.ranking import RANKED_AT_ONCE, class_ranks, hit_rates, reciprocal_ranks

CUTOFFS = (10, 50)
HEAD_SHARE = 0.1  # of the items, the most popular ones


def corpus_ranks(
    query_QD: np.ndarray, item_ND: np.ndarray, targets_Q: np.ndarray, excluded_Q: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Where each query's relevant item stands in the whole corpus, by scalar product.

    Args:
        query_QD: vectors of the queries, (Q, D).
        item_ND: vectors of all items, (N, D), of the same type.
        targets_Q: row of each query's relevant item, in [0, N).
        excluded_Q: row of an item that is no candidate of the query, the query item itself; where it is the relevant
            item, it stays one. Default: every item is a candidate.

    Returns:
        Items that score higher, and items that score the same (itself included), as `ranking.class_ranks`; (Q,) each.

    Raises:
        ValueError: a vector is not finite, or shapes or targets do not fit.
    """
    if query_QD.shape[1:] != item_ND.shape[1:] or (excluded_Q is not None and excluded_Q.shape != targets_Q.shape):
        raise ValueError(
            f"queries {query_QD.shape}, items {item_ND.shape}, targets {targets_Q.shape}: vectors of one width, "
            "and one target (and excluded item) per query"
        )
    if not len(item_ND):
        raise ValueError("a corpus without items: retrieval needs at least the relevant ones")
    num_higher_Q, num_same_Q = np.empty((2, len(query_QD)), dtype=np.int64)
    size = max(1, RANKED_AT_ONCE // len(item_ND))
    for start in range(0, len(query_QD), size):
        part = slice(start, start + size)
        targets, scores = targets_Q[part], query_QD[part] @ item_ND.T
        num_higher_Q[part], num_same_Q[part] = class_ranks(scores, targets)
        if excluded_Q is not None:
            rows = np.arange(len(targets))
            excluded, own = excluded_Q[part], scores[rows, targets]
            score = scores[rows, excluded]
            num_higher_Q[part] -= (score > own) & (excluded != targets)
            num_same_Q[part] -= (score == own) & (excluded != targets)
    return num_higher_Q, num_same_Q


def retrieval_scores(
    num_higher_Q: np.ndarray, num_same_Q: np.ndarray, cutoffs: Sequence[int] = CUTOFFS
) -> dict[str, np.ndarray]:
    """Per query `recall_at_k` and `map_at_k`, float64 (Q,) in [0, 1]; with one relevant item the latter is 1 / rank.

    Args:
        num_higher_Q: from `corpus_ranks`.
        num_same_Q: likewise.
        cutoffs: values of k.
    """
    recalls = {f"recall_at_{k}": hit_rates(num_higher_Q, num_same_Q, k) for k in cutoffs}
    return recalls | {f"map_at_{k}": reciprocal_ranks(num_higher_Q, num_same_Q, k) for k in cutoffs}


def head_items(counts_N: np.ndarray, share: float = HEAD_SHARE) -> np.ndarray:
    """Which items are among the most popular ones, bool (N,); of equally popular ones the earlier row comes first.

    Source: Yao et al. 2021 (arXiv 2007.12865, section 4.4): head queries are those whose relevant item is among the
    10% most frequent items. Differs: an item that training never held is no head item.

    Args:
        counts_N: events of each item of the corpus in training.
        share: of the corpus, rounded up.
    """
    is_head_N = np.zeros(len(counts_N), dtype=bool)
    is_head_N[np.argsort(-counts_N, kind="stable")[: int(np.ceil(share * len(counts_N)))]] = True
    return is_head_N & (counts_N > 0)


def sliced_means(scores: dict[str, np.ndarray], is_head_Q: np.ndarray) -> dict[str, dict[str, float]]:
    """Means over all queries, over those with a head item, and over the rest (`tail`), with their `num_queries`.

    A slice without queries is absent.

    Args:
        scores: from `retrieval_scores`.
        is_head_Q: whether a query's relevant item is a head item, bool (Q,).
    """
    slices = {"all": np.ones_like(is_head_Q), "head": is_head_Q, "tail": ~is_head_Q}
    return {
        name: {"num_queries": float(chosen.sum())} | {metric: float(v[chosen].mean()) for metric, v in scores.items()}
        for name, chosen in slices.items()
        if chosen.any()
    }
