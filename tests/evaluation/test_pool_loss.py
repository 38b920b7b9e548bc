"""Loss and recall among a pool: torch's cross-entropy, known answers, the same in blocks of any size."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from userrep.evaluation import pool_loss
from userrep.evaluation.pool_loss import SCALES, best_scale, infonce, pool_recall
from userrep.evaluation.ranking import retrieval_hits


def views(num_users: int, dim: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors of users, float32; the second view is the first with noise."""
    rng = np.random.default_rng(seed)
    anchor = rng.normal(size=(num_users, dim))
    positive = anchor + noise * rng.normal(size=anchor.shape)
    anchor, positive = (view / np.linalg.norm(view, axis=1, keepdims=True) for view in (anchor, positive))
    return anchor.astype(np.float32), positive.astype(np.float32)


@pytest.mark.parametrize("scale", [0.1, 14.3, 1000.0])
@pytest.mark.parametrize("at_once", [1, 7 * 23, 1 << 20])
def test_infonce_is_that_of_torch(scale: float, at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_loss, "SCORES_AT_ONCE", at_once)
    anchor, positive = views(23, 5, 1.0)
    logits, target = scale * torch.from_numpy(anchor).double() @ torch.from_numpy(positive).double().T, torch.arange(23)
    both = [torch.nn.functional.cross_entropy(direction, target).item() for direction in (logits, logits.T)]
    assert infonce(anchor, positive, scale) == pytest.approx(sum(both) / 2, rel=1e-12)


@pytest.mark.parametrize("at_once", [40, 1 << 20])
@pytest.mark.parametrize("noise", [0.4, 1.0, 3.0])
def test_best_scale_is_that_of_a_plain_search(noise: float, at_once: int, monkeypatch: pytest.MonkeyPatch):
    anchor, positive = views(60, 6, noise, seed=1)
    low, high = np.log(SCALES)
    options = {"xatol": 1e-7}
    found = minimize_scalar(
        lambda log: infonce(anchor, positive, np.exp(log)), bounds=(low, high), method="bounded", options=options
    )
    monkeypatch.setattr(pool_loss, "SCORES_AT_ONCE", at_once)
    best = best_scale(anchor, positive)
    assert best.loss == pytest.approx(found.fun, abs=1e-9)
    assert best.scale == pytest.approx(np.exp(found.x), rel=1e-3)
    assert best.loss == infonce(anchor, positive, best.scale)


def test_unrelated_views_have_the_loss_of_chance():
    anchor, positive = views(400, 32, 0)[0], views(400, 32, 0, seed=9)[0]
    assert best_scale(anchor, positive).loss == pytest.approx(np.log(400), abs=5e-3)


def test_opposite_views_are_best_at_the_smallest_scale():
    anchor, _ = views(20, 8, 0)
    best = best_scale(anchor, -anchor)
    assert best.scale == SCALES[0]
    assert best.loss > np.log(20)


def test_equal_orthogonal_views_are_best_at_the_largest_scale():
    vectors = np.eye(30, dtype=np.float32)
    assert best_scale(vectors, vectors) == (SCALES[1], pytest.approx(0, abs=1e-12))
    assert pool_recall(vectors, vectors) == {1: 1.0, 10: 1.0}


@pytest.mark.parametrize("at_once", [1, 100, 1 << 20])
def test_recall_is_that_of_the_whole_matrix(at_once: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_loss, "SCORES_AT_ONCE", at_once)
    rng = np.random.default_rng(2)
    anchor, positive = (rng.integers(-2, 3, size=(41, 3)).astype(np.float32) for _ in range(2))  # with many ties
    expected = {k: hits.mean() for k, hits in retrieval_hits(anchor @ positive.T).items()}
    assert pool_recall(anchor, positive) == pytest.approx(expected)


def test_recall_of_equal_vectors_is_chance():
    same = np.tile(np.array([[0.6, 0.8]], dtype=np.float32), (40, 1))
    assert pool_recall(same, same) == pytest.approx({1: 1 / 40, 10: 1 / 4})


@pytest.mark.parametrize("measure", [best_scale, pool_recall, lambda a, b: infonce(a, b, 1.0)])
def test_unusable_vectors_are_refused(measure):
    anchor, positive = views(5, 3, 1.0)
    with pytest.raises(ValueError, match=r"anchors are \(5, 3\) and positives \(4, 3\)"):
        measure(anchor, positive[:4])
    with pytest.raises(ValueError, match="at least 2 users"):
        measure(anchor[:1], positive[:1])
    positive[3, 1] = np.nan
    with pytest.raises(ValueError, match="the encoder has diverged"):
        measure(anchor, positive)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_unusable_scale_is_refused(scale: float):
    with pytest.raises(ValueError, match="scale is"):
        infonce(*views(3, 2, 1.0), scale)
