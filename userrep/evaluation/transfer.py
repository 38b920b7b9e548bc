"""What tasks give each other: forward and backward transfer, and how sure one may be of them over seeds.

Everything comes from one matrix of a run: R[j, i] is the score on task i after training up to task j, both counted in
the order of training; NaN where i > j, since the task has no head yet.

Source: arXiv 2306.01792, section on forward and backward transfer. Differs: none.

Legend: `M` tasks in the order of training; `...` any axes before, such as seeds. All results are float64.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Interval:
    """A mean over seeds with its 95% interval (Student's t); the interval of a single seed is NaN.

    Attributes:
        mean: array of the shape of one seed's values; so are the others.
        low: lower end.
        high: upper end.
        num_seeds: that the mean is over.
    """

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_seeds: int


def forward_transfer(scores_MM: np.ndarray, single_M: np.ndarray) -> np.ndarray:
    """How much better each task is learned after the tasks before it than alone, in percent, (..., M).

    (R[i, i] - single[i]) / single[i] * 100; NaN for the first task, before which there is none, and where single is 0.

    Args:
        scores_MM: R, (..., M, M).
        single_M: scores of a model trained from scratch on each task alone (SinMo), (..., M), in the same order.

    Raises:
        ValueError: R is not square, or lacks a score.
    """
    transfer = _percent_over(_learned(scores_MM), np.asarray(single_M, dtype=np.float64))
    transfer[..., 0] = np.nan
    return transfer


def backward_transfer(scores_MM: np.ndarray) -> np.ndarray:
    """How much each task's score has changed by the end since it was learned, in percent, (..., M).

    (R[M - 1, i] - R[i, i]) / R[i, i] * 100, negative where it is forgotten; NaN for the last task, after which there is
    none, and where R[i, i] is 0.

    Args:
        scores_MM: R, (..., M, M).

    Raises:
        ValueError: R is not square, or lacks a score.
    """
    learned = _learned(scores_MM)
    transfer = _percent_over(np.asarray(scores_MM, dtype=np.float64)[..., -1, :], learned)
    transfer[..., -1] = np.nan
    return transfer


def mean_interval(values: np.ndarray) -> Interval:
    """Mean and interval of values (seeds, ...) over seeds.

    Raises:
        ValueError: no seed.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim < 1 or not len(values):
        raise ValueError(f"values have the shape {values.shape}: the first axis must hold at least one seed")
    num_seeds, mean = len(values), values.mean(axis=0)
    if num_seeds == 1:
        unknown = np.full_like(mean, np.nan)
        return Interval(mean, unknown, unknown, num_seeds)
    error = values.std(axis=0, ddof=1) / np.sqrt(num_seeds)
    reach = stdtrit(num_seeds - 1, (1 + CONFIDENCE) / 2) * error
    return Interval(mean, mean - reach, mean + reach, num_seeds)


def paired_difference(own: np.ndarray, other: np.ndarray) -> Interval:
    """Mean and interval of own minus other, seed by seed: what both owe to the seed cancels.

    Args:
        own: values of one method, (seeds, ...).
        other: those of another with the same seeds in the same order.

    Raises:
        ValueError: shapes differ.
    """
    own, other = np.asarray(own, dtype=np.float64), np.asarray(other, dtype=np.float64)
    if own.shape != other.shape:
        raise ValueError(f"values of shapes {own.shape} and {other.shape}: pairs need the same seeds and tasks")
    return mean_interval(own - other)


def _learned(scores_MM: np.ndarray) -> np.ndarray:
    """R[i, i], (..., M), once R has been found complete."""
    scores_MM = np.asarray(scores_MM, dtype=np.float64)
    if scores_MM.ndim < 2 or scores_MM.shape[-1] != scores_MM.shape[-2] or not scores_MM.shape[-1]:
        raise ValueError(f"scores have the shape {scores_MM.shape}: R must be (..., tasks, tasks)")
    lacking = np.argwhere(~np.isfinite(scores_MM) & np.tri(scores_MM.shape[-1], dtype=bool))
    if len(lacking):
        raise ValueError(
            f"R[{', '.join(map(str, lacking[0]))}] and {len(lacking) - 1} other scores on or below the diagonal are "
            "missing: rows are what was trained last, columns what is measured; every task is measured after each one"
        )
    return np.diagonal(scores_MM, axis1=-2, axis2=-1)


def _percent_over(scores: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(scores - reference) / reference in percent, NaN where the reference is 0."""
    scores, reference = np.broadcast_arrays(scores, reference)
    change = np.full(scores.shape, np.nan)
    np.divide(scores - reference, reference, out=change, where=reference != 0)
    return 100 * change
