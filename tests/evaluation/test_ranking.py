"""Retrieval metrics: known answers, ties in expectation, independence of the order of the pool."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.evaluation.ranking import compare_retrieval, expected_hits, retrieval_hits


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
