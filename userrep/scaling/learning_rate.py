"""Learning rate against width and batch, from short runs of small encoders: the rule that `scaling/ladder.py` follows.

Every pair of a width and a batch is run at several learning rates. The best one is the lowest point of a parabola
through log(rate) and loss; its logarithm is then linear in the logarithms of width and batch.

Source: optimum by a parabola in the logarithm: as IsoFLOP profiles, Hoffmann et al. 2022 (arXiv 2203.15556, section
3.2); power laws of the best rate: DeepSeek LLM (arXiv 2401.02954, section 3.1). Differs: in width and batch, not in
compute.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from userrep.scaling.rules import PowerRule, RateRule

NEIGHBOURS = 2  # rates on either side of the best one that shape the parabola; farther away it is none
MAX_RATIO_SPREAD = 1e-3  # between the two rates of trials of one width and batch; cells carry four digits


@dataclass(frozen=True)
class RateTrial:
    """A short run. `loss` is measured on the same held-out users for all; NaN or infinite: the run diverged."""

    dim: int
    batch_size: int
    learning_rate: float
    embedding_learning_rate: float
    loss: float


@dataclass(frozen=True)
class RateOptimum:
    """Best learning rates of a width and a batch."""

    dim: int
    batch_size: int
    learning_rate: float
    embedding_learning_rate: float


@dataclass(frozen=True)
class RateFit:
    """A measured rule.

    Attributes:
        rule: for `LadderConfig.rate`.
        optima: that it was fitted to.
        worst_factor: largest ratio between an optimum and what the rule says of it, >= 1.
    """

    rule: RateRule
    optima: tuple[RateOptimum, ...]
    worst_factor: float


def fit_rate_rule(trials: Sequence[RateTrial], base: RateRule, measured_in: str) -> RateFit:
    """Fits values and exponents of the rule to trials.

    Args:
        trials: of at least two widths and two batches that do not change together, at three rates or more each. Within
            a width and batch both rates are scaled together.
        base: rule whose reference width and batch are kept.
        measured_in: what the ladder prints as the source, such as the record of the trials.

    Raises:
        ValueError: the trials do not say what the rule needs to know.
    """
    groups: dict[tuple[int, int], list[RateTrial]] = defaultdict(list)
    for trial in trials:
        groups[trial.dim, trial.batch_size].append(trial)
    optima = tuple(find_optimum(group) for _, group in sorted(groups.items()))
    design = np.array(
        [[1, math.log(o.dim / base.reference_dim), math.log(o.batch_size / base.reference_batch_size)] for o in optima]
    ).reshape(-1, 3)
    if np.linalg.matrix_rank(design) < 3:
        raise ValueError(
            f"trials at (width, batch) {sorted(groups)} cannot tell width from batch: run at least two widths at one "
            "batch, and one of them at a second batch"
        )
    rules, worst = [], 0.0
    for name in ("learning_rate", "embedding_learning_rate"):
        target = np.log([getattr(optimum, name) for optimum in optima])
        level, width, batch = np.linalg.lstsq(design, target, rcond=None)[0].tolist()
        worst = max(worst, float(np.abs(design @ [level, width, batch] - target).max()))
        rules.append(PowerRule(value=math.exp(level), width_exponent=width, batch_exponent=batch))
    rule = RateRule(
        reference_dim=base.reference_dim,
        reference_batch_size=base.reference_batch_size,
        matrices=rules[0],
        embeddings=rules[1],
        measured_in=measured_in,
    )
    return RateFit(rule, optima, math.exp(worst))


def find_optimum(trials: Sequence[RateTrial]) -> RateOptimum:
    """Best learning rates of trials of one width and batch.

    Raises:
        ValueError: the best rate is the smallest or the largest that was tried and came through, or the rates were not
            scaled together.
    """
    dim, batch_size = trials[0].dim, trials[0].batch_size
    trials = sorted(trials, key=lambda trial: trial.learning_rate)
    where = f"trials of width {dim} and batch {batch_size}"
    ratios = [trial.embedding_learning_rate / trial.learning_rate for trial in trials]
    if max(ratios) > min(ratios) * (1 + MAX_RATIO_SPREAD):
        raise ValueError(f"{where} have different ratios between their two learning rates: scale both by one factor")
    finite = [trial for trial in trials if math.isfinite(trial.loss)]
    best = min(range(len(finite)), key=lambda n: finite[n].loss, default=-1)
    if not 0 < best < len(finite) - 1:
        tried = ", ".join(f"{trial.learning_rate:g}: {trial.loss:g}" for trial in trials)
        raise ValueError(f"{where} have no minimum between two rates that came through: try more rates ({tried})")
    near = finite[max(0, best - NEIGHBOURS) : best + NEIGHBOURS + 1]
    center = math.log(finite[best].learning_rate)
    x = np.array([math.log(trial.learning_rate) - center for trial in near])
    curvature, slope, _ = np.polyfit(x, [trial.loss for trial in near], 2)
    # Noise may bend the parabola; its lowest point stays between the neighbours of the best trial.
    lowest, highest = (math.log(finite[best + side].learning_rate) - center for side in (-1, 1))
    shift = min(max(-slope / (2 * curvature), lowest), highest) if curvature > 0 else 0.0
    rate = math.exp(center + shift)
    return RateOptimum(dim, batch_size, rate, rate * float(np.mean(ratios)))
