"""Ranking among all items against a naive loop."""

import itertools
import math

import numpy as np
import pytest

from userrep.evaluation.next_item_ranking import paired_differences, rank_next_items, summarize
from userrep.evaluation.ranking import class_ranks, discounted_gains


def naive_values(scores: list[float], target: int) -> list[float]:
    """NDCG at 10, recall at 10, reciprocal rank: means over all ranks that random orders of ties give."""
    better = sum(score > scores[target] for score in scores)
    same = sum(score == scores[target] for score in scores)
    ranks = range(better + 1, better + same + 1)
    gains = [[1 / math.log2(1 + r) if r <= 10 else 0, float(r <= 10), 1 / r] for r in ranks]
    return [sum(column) / same for column in zip(*gains, strict=True)]


@pytest.mark.parametrize("users_at_once", [1, 7, 100])
def test_values_are_those_of_a_naive_loop(users_at_once: int) -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 12, size=(60, 41)).astype(np.float32), rng.integers(0, 41, 60)
    ranks = rank_next_items(lambda start, stop: scores[start:stop], targets, users_at_once)
    values = ranks.values()
    expected = np.array([naive_values(row.tolist(), target) for row, target in zip(scores, targets, strict=True)])
    assert list(values) == ["ndcg_at_10", "recall_at_10", "mrr"]
    np.testing.assert_allclose(np.stack(list(values.values()), axis=1), expected, rtol=1e-12)


def test_scores_are_asked_for_in_parts() -> None:
    asked = []

    def scores(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        return np.zeros((stop - start, 5))

    ranks = rank_next_items(scores, np.zeros(7, dtype=np.int64), 3)
    assert asked == [(0, 3), (3, 6), (6, 7)]
    # A constant scorer gives chance.
    assert ranks.values()["mrr"] == pytest.approx(np.full(7, np.mean([1 / rank for rank in range(1, 6)])))
    assert ranks.values()["recall_at_10"].tolist() == [1.0] * 7


def test_discounted_gain_is_the_mean_over_orders_of_ties() -> None:
    for scores in ([1, 1, 0], [0, 1, 1, 1], [2, 1, 1, 0, 1]):
        for target, k in itertools.product(range(len(scores)), (1, 2, 10)):
            found = []
            for order in itertools.permutations(range(len(scores))):
                rank = 1 + sorted(order, key=lambda index: -scores[index]).index(target)
                found.append(1 / math.log2(1 + rank) if rank <= k else 0)
            ranks = class_ranks(np.array([scores], dtype=float), np.array([target]))
            assert discounted_gains(*ranks, k)[0] == pytest.approx(np.mean(found))


def test_nothing_to_rank_is_an_error() -> None:
    with pytest.raises(ValueError, match="no user to rank items for"):
        rank_next_items(lambda start, stop: np.zeros((0, 3)), np.zeros(0, dtype=np.int64))


def test_slices_are_means_over_their_users() -> None:
    values = {"mrr": np.random.default_rng(0).random(200)}
    is_cold = np.arange(200) % 4 == 0
    found = summarize(values, {"cold": is_cold, "in_set": ~is_cold, "nobody": np.zeros(200, dtype=bool)})
    assert found["cold"]["num_users"] == 50
    assert found["cold"]["mrr"]["mean"] == pytest.approx(values["mrr"][::4].mean())
    whole = found["all"]["mrr"]
    assert whole["low"] < whole["mean"] < whole["high"]
    assert whole["mean"] == pytest.approx((found["cold"]["mrr"]["mean"] + 3 * found["in_set"]["mrr"]["mean"]) / 4)
    assert found["nobody"] == {"num_users": 0}


def test_differences_are_taken_user_by_user() -> None:
    other = np.random.default_rng(0).random(500)
    found = paired_differences({"mrr": other + 0.01}, {"mrr": other})["mrr"]
    # The users differ much more than that from each other.
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((0.01, 0.01, 0.01))
    with pytest.raises(ValueError, match="500 users against 499"):
        paired_differences({"mrr": other}, {"mrr": other[1:]})
