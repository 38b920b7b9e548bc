"""Full-corpus retrieval against all orders of ties, and its slices."""

import itertools

import numpy as np
import pytest

from userrep.evaluation import retrieval
from userrep.evaluation.retrieval import corpus_ranks, head_items, retrieval_scores, sliced_means


def draw(num_queries: int, num_items: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vectors of small whole numbers, so that many scores are equal."""
    rng = np.random.default_rng(seed)
    queries, items = (rng.integers(-1, 2, (size, 2)).astype(np.float32) for size in (num_queries, num_items))
    return queries, items, rng.integers(0, num_items, num_queries)


def naive(scores: np.ndarray, target: int, k: int) -> tuple[float, float]:
    """Recall and reciprocal rank at k, mean over all orders of the candidates."""
    recalls, precisions = [], []
    for order in itertools.permutations(range(len(scores))):
        ranked = sorted(order, key=lambda item: -scores[item])
        rank = ranked.index(target) + 1
        recalls.append(rank <= k)
        precisions.append(1 / rank if rank <= k else 0)
    return float(np.mean(recalls)), float(np.mean(precisions))


@pytest.mark.parametrize("excludes_query", [False, True])
def test_equals_the_mean_over_all_orders(excludes_query: bool) -> None:
    queries, items, targets = draw(20, 6)
    excluded = np.arange(20) % 6
    ranks = corpus_ranks(queries, items, targets, excluded if excludes_query else None)
    scores = retrieval_scores(*ranks, cutoffs=(1, 3))
    for number, target in enumerate(targets.tolist()):
        candidates = queries[number] @ items.T
        if excludes_query and excluded[number] != target:
            candidates = np.delete(candidates, excluded[number])
            target -= target > excluded[number]
        for k in (1, 3):
            recall, precision = naive(candidates, target, k)
            assert scores[f"recall_at_{k}"][number] == pytest.approx(recall)
            assert scores[f"map_at_{k}"][number] == pytest.approx(precision)


def test_parts_of_the_queries_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = draw(50, 30)
    whole = corpus_ranks(*given)
    monkeypatch.setattr(retrieval, "RANKED_AT_ONCE", 100)
    for actual, expected in zip(corpus_ranks(*given), whole, strict=True):
        assert np.array_equal(actual, expected)


def test_equal_vectors_find_by_chance() -> None:
    ranks = corpus_ranks(np.ones((4, 3)), np.ones((200, 3)), np.array([0, 7, 99, 199]))
    scores = retrieval_scores(*ranks)
    assert scores["recall_at_10"].tolist() == [0.05] * 4
    assert scores["recall_at_50"].tolist() == [0.25] * 4
    assert scores["map_at_10"] == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 200)


def test_head_items_are_the_most_popular_tenth() -> None:
    counts = np.array([5, 0, 9, 1, 5, 2, 0, 0, 0, 0, 0])
    assert np.flatnonzero(head_items(counts)).tolist() == [0, 2]
    assert np.flatnonzero(head_items(counts, 0.9)).tolist() == [0, 2, 3, 4, 5]  # what no one bought is never head


def test_slices_part_the_queries() -> None:
    scores = {"recall_at_10": np.array([1.0, 0.0, 0.5])}
    means = sliced_means(scores, np.array([True, False, False]))
    assert means["all"] == {"num_queries": 3, "recall_at_10": 0.5}
    assert means["head"] == {"num_queries": 1, "recall_at_10": 1.0}
    assert means["tail"] == {"num_queries": 2, "recall_at_10": 0.25}
    assert "head" not in sliced_means(scores, np.zeros(3, dtype=bool))


def test_what_cannot_be_ranked_is_refused() -> None:
    queries, items, targets = draw(3, 4)
    with pytest.raises(ValueError, match="vectors of one width"):
        corpus_ranks(queries[:, :1], items, targets)
    with pytest.raises(ValueError, match="without items"):
        corpus_ranks(queries, items[:0], targets)
    with pytest.raises(ValueError, match="not finite"):
        corpus_ranks(np.full_like(queries, np.nan), items, targets)
