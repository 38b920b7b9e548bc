"""The gate: whether a new version may take the place of the one that an alias points to.

Needs numpy: `pip install 'userrep[tables]'`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from pydantic import Field

from userrep.config import Config
from userrep.publishing.comparison import Comparison
from userrep.publishing.quality import KEY_COLUMN, QUALITY_NAME

NUM_RESAMPLES = 2000
MIN_COMMON_USERS = 100  # measured in both versions; with fewer, the same users are no better than other ones
NORMAL_95 = 1.96


class GateConfig(Config):
    """What a version must hold against the one before. Each bound is a choice; its reason stands beside it."""

    force: bool = False  # release whatever the gate finds; what it found is recorded with the version
    # Metrics of which more is better. A drop that chance explains (95% interval of the difference) passes.
    metrics: tuple[str, ...] = ("test/recall_at_10",)
    max_drop: float = Field(default=0.0, ge=0)  # on top of the interval; 0: any drop that is certain is refused
    # A part of 16 is 6% of the ids: one that got lost on the way is refused, a month's leavers are not.
    min_rows_share: float = Field(default=0.95, ge=0)
    min_kept_share: float = Field(default=0.95, ge=0, le=1)
    # Vectors are of norm 1, to 1e-3 in float16: more is another normalisation.
    max_norm_change: float = Field(default=0.01, ge=0)
    # 0: vectors in all directions, 1: all the same. An encoder that collapses goes to 1, and retrieval with it.
    max_mean_vector_change: float = Field(default=0.2, ge=0)
    # Unrelated tables share 10 of 2000, half a percent; ten times that is still another idea of who is alike.
    min_neighbour_overlap: float = Field(default=0.05, ge=0, le=1)
    neighbours: int = Field(default=10, ge=1)
    sample: int = Field(default=2000, ge=100)  # common users among whom neighbours are sought: 2 x 16 MB of scores
    seed: int = Field(default=0, ge=0)


class GateRefusedError(ValueError):
    """The new version is worse than the one in use; the message says in what, and how to release it all the same."""


@dataclass(frozen=True)
class Quality:
    """What is known of the quality of a version.

    Attributes:
        metrics: by name.
        users: that they are means over; None where that is unknown.
        table_dir: a directory that may hold the quality of each user.
    """

    metrics: Mapping[str, float]
    users: int | None
    table_dir: Path


@dataclass(frozen=True)
class Check:
    """One question of the gate, and its answer."""

    what: str
    is_passed: bool
    detail: str


@dataclass(frozen=True)
class GateReport:
    """All answers, and the figures that they are from."""

    against: int  # version that the alias points to
    checks: tuple[Check, ...]
    drift: Mapping[str, object] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[Check, ...]:
        """What speaks against a release."""
        return tuple(check for check in self.checks if not check.is_passed)

    def text(self) -> str:
        """JSON of everything, to lie beside the version."""
        return json.dumps(asdict(self), indent=1) + "\n"


def judge(comparison: Comparison, old: Quality, new: Quality, config: GateConfig, against: int) -> GateReport:
    """Asks all questions.

    Args:
        comparison: of the two tables.
        old: of the version in use.
        new: of the one that is to take its place.
        config: the bounds.
        against: number of the version in use.
    """
    checks = [_quality_check(metric, old, new, config) for metric in config.metrics]
    checks += [*_coverage_checks(comparison, config), *_drift_checks(comparison, config)]
    return GateReport(against, tuple(checks), comparison.drift())


def _quality_check(metric: str, old: Quality, new: Quality, config: GateConfig) -> Check:
    """Passes unless the metric has dropped by more than chance explains."""
    before, now = old.metrics.get(metric), new.metrics.get(metric)
    if before is None:
        return Check(metric, True, "the version in use has no such figure: nothing to compare with")
    if now is None:
        return Check(metric, False, f"was {before:.4f}; the new version does not say")
    change, high, how = _interval_of_change(metric, before, now, old, new)
    detail = f"{before:.4f} -> {now:.4f}, change {change:+.4f}, at most {high:+.4f} with 95% certainty ({how})"
    return Check(metric, high >= -config.max_drop, detail)


def _interval_of_change(metric: str, before: float, now: float, old: Quality, new: Quality) -> tuple[float, float, str]:
    """Change, upper end of its 95% interval, and how that was found."""
    paired = _paired_values(metric, old.table_dir, new.table_dir)
    if paired is not None:
        changes = paired[1] - paired[0]
        means = np.random.default_rng(0).choice(changes, size=(NUM_RESAMPLES, len(changes))).mean(axis=1)
        how = f"bootstrap over {len(changes)} users measured in both"
        return float(changes.mean()), float(np.quantile(means, 0.975)), how
    change = now - before
    if old.users and new.users and 0 <= before <= 1 and 0 <= now <= 1:
        spread = sqrt(before * (1 - before) / old.users + now * (1 - now) / new.users)
        how = f"binomial, from means over {old.users} and {new.users} users: too wide for what is no hit or miss"
        return change, change + NORMAL_95 * spread, how
    return change, change, "no number of users is known, so no interval: any drop counts"


def _paired_values(metric: str, old_dir: Path, new_dir: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """Values of the users that were measured in both versions; None where that is not known, or too few were."""
    columns = []
    for directory in (old_dir, new_dir):
        path = directory / QUALITY_NAME
        if not path.is_file() or metric not in pq.read_schema(path).names:
            return None
        rows = pq.read_table(path, columns=[KEY_COLUMN, metric])
        columns.append((rows[KEY_COLUMN].to_numpy(), rows[metric].to_numpy().astype(np.float64)))
    _, in_old, in_new = np.intersect1d(columns[0][0], columns[1][0], return_indices=True)
    return (columns[0][1][in_old], columns[1][1][in_new]) if len(in_old) >= MIN_COMMON_USERS else None


def _coverage_checks(found: Comparison, config: GateConfig) -> list[Check]:
    old_rows = max(1, found.old_rows)
    rows_share, kept_share = found.new_rows / old_rows, found.common / old_rows
    return [
        Check(
            "rows",
            found.old_rows == 0 or rows_share >= config.min_rows_share,
            f"{found.old_rows:,} -> {found.new_rows:,}, {rows_share:.1%}; at least {config.min_rows_share:.1%}",
        ),
        Check(
            "ids kept",
            found.old_rows == 0 or kept_share >= config.min_kept_share,
            f"{found.common:,} of {found.old_rows:,}, {kept_share:.1%}; at least {config.min_kept_share:.1%}",
        ),
    ]


def _drift_checks(found: Comparison, config: GateConfig) -> list[Check]:
    norm, collapse = (
        abs(found.new_norms.mean - found.old_norms.mean),
        abs(found.new_norms.of_mean - found.old_norms.of_mean),
    )
    checks = [
        Check(
            "norms",
            norm <= config.max_norm_change,
            f"mean {found.old_norms.mean:.4f} -> {found.new_norms.mean:.4f}; change at most {config.max_norm_change}",
        ),
        Check(
            "mean vector",
            collapse <= config.max_mean_vector_change,
            f"norm {found.old_norms.of_mean:.4f} -> {found.new_norms.of_mean:.4f}; change at most "
            f"{config.max_mean_vector_change}",
        ),
    ]
    if found.neighbour_overlap is None:
        detail = f"{found.sample} ids are in both: too few to compare neighbours"
        return [*checks, Check("neighbours", True, detail)]
    detail = (
        f"{found.neighbour_overlap:.1%} of the {config.neighbours} nearest among {found.sample} common ids are the "
        f"same; at least {config.min_neighbour_overlap:.1%}"
    )
    return [*checks, Check("neighbours", found.neighbour_overlap >= config.min_neighbour_overlap, detail)]
