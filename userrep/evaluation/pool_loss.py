"""InfoNCE and recall of a model among a pool of users that is never held as a whole P x P matrix.

The loss in training has a floor that moves with the batch, and a temperature that lags behind the encoder. A pool of
one size, at the temperature that suits the vectors best, compares encoders whatever they were trained with.

At scale s the loss of a user in one direction is logsumexp_j(s x_ij) - s x_ii: a maximum of linear functions, smoothed,
minus a linear one. So the mean over users is convex in s, and its minimum is where the slope changes its sign.

Legend: `P` users of the pool, `D` width, `R` users of a block; x_ij is the inner product of the anchor of user i with
the positive of user j.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
from scipy.optimize import brentq

from userrep.evaluation.ranking import CUTOFFS, class_ranks, hit_rates

SCORES_AT_ONCE = 1 << 21  # float64 scores of a block: 16 MiB, a few times of it with what is made of them
SCALES = (0.1, 1000.0)  # temperatures from 10, where all candidates look alike, to 0.001
LOG_SCALE_TOLERANCE = 1e-5  # of the best scale; the loss is flat there, so it is exact to the square of this


class BestScale(NamedTuple):
    """The scale (1 / temperature) of the smallest loss, and that loss in nats."""

    scale: float
    loss: float


def infonce(anchor_PD: np.ndarray, positive_PD: np.ndarray, scale: float) -> float:
    """Symmetric InfoNCE in nats, computed in float64, with the whole pool as the candidates; chance is log P.

    Args:
        anchor_PD: one view of each user, usually of L2 norm 1.
        positive_PD: the other view of the same users.
        scale: 1 / temperature, > 0.

    Raises:
        ValueError: shapes differ, fewer than two users, a vector or the scale is not finite, or the scale not positive.
    """
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale}: a temperature needs a finite scale above 0")
    return _loss_and_slope(_checked(anchor_PD, positive_PD), scale)[0]


def best_scale(anchor_PD: np.ndarray, positive_PD: np.ndarray) -> BestScale:
    """The scale within `SCALES` at which `infonce` is smallest; an end of the range where the loss falls beyond it.

    Raises:
        ValueError: as `infonce`.
    """
    score_blocks = _checked(anchor_PD, positive_PD)

    def slope(log_scale: float) -> float:
        return _loss_and_slope(score_blocks, np.exp(log_scale))[1]

    low, high = np.log(SCALES)
    if slope(low) >= 0:
        scale = SCALES[0]
    elif slope(high) <= 0:
        scale = SCALES[1]
    else:
        scale = float(np.exp(cast(float, brentq(slope, low, high, xtol=LOG_SCALE_TOLERANCE))))
    return BestScale(scale, _loss_and_slope(score_blocks, scale)[0])


def pool_recall(anchor_PD: np.ndarray, positive_PD: np.ndarray) -> dict[int, float]:
    """Recall at each of `CUTOFFS` among the pool, mean of both directions; ties as in `ranking.py`.

    Raises:
        ValueError: as `infonce`.
    """
    recalls: dict[int, float] = dict.fromkeys(CUTOFFS, 0.0)
    for queries_PD, candidates_PD in ((anchor_PD, positive_PD), (positive_PD, anchor_PD)):
        ranks = [
            class_ranks(scores_RP, np.arange(start, start + len(scores_RP)))
            for start, scores_RP in _checked(queries_PD, candidates_PD)()
        ]
        num_higher_P, num_same_P = (np.concatenate(parts) for parts in zip(*ranks, strict=True))
        for k in CUTOFFS:
            recalls[k] += float(hit_rates(num_higher_P, num_same_P, k).mean()) / 2
    return recalls


ScoreBlocks = Callable[[], Iterator[tuple[int, np.ndarray]]]


def _checked(anchor_PD: np.ndarray, positive_PD: np.ndarray) -> ScoreBlocks:
    """A function that goes through all scores: first user of a block, float64 (R, P)."""
    if anchor_PD.ndim != 2 or anchor_PD.shape != positive_PD.shape or len(anchor_PD) < 2:
        raise ValueError(
            f"anchors are {anchor_PD.shape} and positives {positive_PD.shape}: a pool needs two views, of the same "
            "width, of each of at least 2 users"
        )
    if not (np.isfinite(anchor_PD).all() and np.isfinite(positive_PD).all()):
        raise ValueError("vectors of the pool are not finite: the encoder has diverged")
    num_users = len(anchor_PD)
    size = max(1, SCORES_AT_ONCE // num_users)
    candidates_DP = positive_PD.astype(np.float64).T
    whole = anchor_PD.astype(np.float64) @ candidates_DP if size >= num_users else None  # a search looks ten times

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, num_users, size):
            yield start, anchor_PD[start : start + size].astype(np.float64) @ candidates_DP if whole is None else whole

    return blocks


def _loss_and_slope(score_blocks: ScoreBlocks, scale: float) -> tuple[float, float]:
    """The loss at a scale, and its derivative by the scale."""
    row_logs, row_means, own = list[np.ndarray](), list[np.ndarray](), list[np.ndarray]()
    column_log, column_mean = np.array(-np.inf), np.array(0.0)
    for start, scores_RP in score_blocks():
        logits_RP = scale * scores_RP
        own.append(scores_RP[np.arange(len(scores_RP)), start + np.arange(len(scores_RP))])
        log_R, mean_R = _softmax_mean(logits_RP, scores_RP, 1)
        log_P, mean_P = _softmax_mean(logits_RP, scores_RP, 0)
        row_logs.append(log_R)
        row_means.append(mean_R)
        joined_P = np.logaddexp(column_log, log_P)
        column_mean = column_mean * np.exp(column_log - joined_P) + mean_P * np.exp(log_P - joined_P)
        column_log = joined_P
    own_mean = np.concatenate(own).mean()
    log_mean = (np.concatenate(row_logs).mean() + column_log.mean()) / 2
    slope = (np.concatenate(row_means).mean() + column_mean.mean()) / 2 - own_mean
    return float(log_mean - scale * own_mean), float(slope)


def _softmax_mean(logits: np.ndarray, scores: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithm of the sum of exponentials, and the mean score under the softmax, along an axis."""
    largest = logits.max(axis=axis, keepdims=True)
    weights = np.exp(logits - largest)
    total = weights.sum(axis=axis)
    return np.log(total) + largest.squeeze(axis), (weights * scores).sum(axis=axis) / total
