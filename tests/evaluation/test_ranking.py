"""Ranking metrics: known answers, ties in expectation, independence of the order of the pool."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.evaluation import ranking
from userrep.evaluation.ranking import (
    class_ranks,
    compare_retrieval,
    expected_hits,
    mrr_at_k,
    reciprocal_ranks,
    retrieval_hits,
)


def retrieval_metrics(scores: np.ndarray) -> dict[str, float]:
    return compare_retrieval({"own": retrieval_hits(scores)}, "own")["own"]


def test_known_ranks() -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])  # own candidates rank 1, 2, 3
    assert expected_hits(scores, 1).tolist() == [1, 0, 0]
    assert expected_hits(scores, 2).tolist() == [1, 1, 0]
    # Columns: .9 is first, .5 is first, .1 shares second place with .1.
    assert expected_hits(scores.T, 1).tolist() == [1, 1, 0]
    assert expected_hits(scores.T, 2).tolist() == [1, 1, 0.5]


def test_constant_scores_give_chance() -> None:
    metrics = retrieval_metrics(np.zeros((50, 50)))
    assert metrics["recall_at_1"] == pytest.approx(1 / 50)
    assert metrics["recall_at_10"] == pytest.approx(10 / 50)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_ties_are_the_mean_over_random_orders(size: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, size=(size, size)).astype(float)
    hits = np.zeros(size)
    num_orders = 400
    for _ in range(num_orders):
        broken = scores + rng.random(scores.shape) * 0.5
        hits += (broken > np.diagonal(broken)[:, None]).sum(axis=1) < k
    # 5 standard errors of a frequency
    assert np.abs(hits / num_orders - expected_hits(scores, k)).max() <= 5 * 0.5 / num_orders**0.5


def test_order_of_the_pool_is_irrelevant() -> None:
    rng = np.random.default_rng(0)
    scores, order = rng.integers(0, 9, size=(40, 40)).astype(float), rng.permutation(40)
    metrics, shuffled = retrieval_metrics(scores), retrieval_metrics(scores[order][:, order])
    assert shuffled["recall_at_10"] == pytest.approx(metrics["recall_at_10"])


def test_interval_holds_the_mean() -> None:
    metrics = retrieval_metrics(np.random.default_rng(0).random((300, 300)))
    assert metrics["recall_at_10_low"] < metrics["recall_at_10"] < metrics["recall_at_10_high"]


def test_lead_is_judged_user_by_user() -> None:
    rng = np.random.default_rng(0)
    good = rng.random((400, 400)) + 2 * np.eye(400) * (rng.random(400) < 0.5)
    better = good + 2 * np.eye(400) * (rng.random(400) < 0.05)  # finds some more users and loses none
    hits = {"own": retrieval_hits(better), "good": retrieval_hits(good), "same": retrieval_hits(better)}
    results = compare_retrieval(hits, "own")
    assert results["own"]["recall_at_10_low"] < results["good"]["recall_at_10_high"]  # the intervals overlap
    assert 0 < results["good"]["lead_low"] < results["good"]["lead_high"]
    assert results["same"]["lead_low"] == results["same"]["lead_high"] == 0


def test_diverged_encoder_is_an_error() -> None:
    with pytest.raises(ValueError, match="not finite"):
        retrieval_metrics(np.full((3, 3), np.nan))


def naive_reciprocal_rank(scores: list[int], label: int, k: int) -> float:
    """Mean over all orders of the classes of what sorting by score, ties in that order, gives."""
    found = []
    for order in itertools.permutations(range(len(scores))):
        rank = 1 + sorted(order, key=lambda index: -scores[index]).index(label)
        found.append(1 / rank if rank <= k else 0)
    return sum(found) / len(found)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 7), st.data())
def test_reciprocal_rank_is_the_mean_over_orders_of_ties(scores: list[int], k: int, data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(scores) - 1))
    ranks = class_ranks(np.array([scores], dtype=np.float32), np.array([label]))
    assert reciprocal_ranks(*ranks, k)[0] == pytest.approx(naive_reciprocal_rank(scores, label, k))


def test_ranks_are_over_all_classes_and_none_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(57, 23)).astype(np.float32), rng.integers(0, 23, 57)
    logits[::5] = np.round(logits[::5])
    higher = [sum(row[c] > row[label] for c in range(23)) for row, label in zip(logits, labels, strict=True)]
    same = [sum(row[c] == row[label] for c in range(23)) for row, label in zip(logits, labels, strict=True)]
    for at_once in (ranking.RANKED_AT_ONCE, 23 * 10, 1):  # all, ten (with a rest of seven), one sample at once
        monkeypatch.setattr(ranking, "RANKED_AT_ONCE", at_once)
        num_higher, num_same = class_ranks(logits, labels)
        assert num_higher.tolist() == higher
        assert num_same.tolist() == same
    # In parts or at once, the mean is over every sample.
    parts = [class_ranks(logits[start : start + 20], labels[start : start + 20]) for start in range(0, 57, 20)]
    joined_higher, joined_same = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert mrr_at_k(joined_higher, joined_same) == mrr_at_k(num_higher, num_same)


def test_known_mrr_and_accuracy() -> None:
    logits = np.array([[3, 2, 1, 0, -1, -2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [9, 8, 7, 6, 5, 4]], float)
    ranks = class_ranks(logits, np.array([0, 4, 4, 5]))  # ranks 1, 2, 5 and 6
    assert reciprocal_ranks(*ranks, 5).tolist() == pytest.approx([1, 1 / 2, 1 / 5, 0])
    assert mrr_at_k(*ranks) == pytest.approx(1.7 / 4)
    assert mrr_at_k(*ranks, k=1) == 1 / 4
    assert mrr_at_k(*ranks, k=6) == pytest.approx((1.7 + 1 / 6) / 4)


def test_constant_logits_give_chance() -> None:
    ranks = class_ranks(np.zeros((10, 40)), np.arange(10))
    assert mrr_at_k(*ranks, k=1) == pytest.approx(1 / 40)
    assert mrr_at_k(*ranks) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 40)


def test_ranks_of_nothing_usable() -> None:
    with pytest.raises(ValueError, match="samples 0 to 1 are not finite"):
        class_ranks(np.array([[0, 1], [np.nan, 1]]), np.array([0, 0]))
    for labels in ([0, 2], [0, -1], [0]):
        with pytest.raises(ValueError, match=r"one in \[0, 2\) per sample"):
            class_ranks(np.zeros((2, 2)), np.array(labels))
    with pytest.raises(ValueError, match="no sample to rank"):
        mrr_at_k(*class_ranks(np.zeros((0, 3)), np.zeros(0, dtype=np.int64)))
