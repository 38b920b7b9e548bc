"""The gate: every question refuses what it is there for, and nothing that chance explains."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.publishing.matrices import rotated, unit_matrix, write_matrix
from userrep.publishing.comparison import Comparison, Norms, compare
from userrep.publishing.gate import GateConfig, GateReport, Quality, judge

METRIC = "test/recall_at_10"
SAME = Comparison(1000, 1000, 1000, Norms(1, 0, 0.1), Norms(1, 0, 0.1), 0.4, 1000)


def quality(value: float | None, users: int | None = 1000, directory: Path = Path("none")) -> Quality:
    return Quality({} if value is None else {METRIC: value}, users, directory)


def verdict(
    comparison: Comparison = SAME, old: Quality | None = None, new: Quality | None = None, **bounds
) -> GateReport:
    return judge(comparison, old or quality(0.5), new or quality(0.5), GateConfig(**bounds), against=1)


def failed(report: GateReport) -> list[str]:
    return [check.what for check in report.failures]


def test_a_version_that_is_no_worse_passes():
    assert failed(verdict()) == []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"new_rows": 940}, "rows"),
        ({"common": 940}, "ids kept"),
        ({"new_norms": Norms(1.02, 0, 0.1)}, "norms"),
        ({"new_norms": Norms(1, 0, 0.9)}, "mean vector"),
        ({"neighbour_overlap": 0.01}, "neighbours"),
    ],
)
def test_each_bound_refuses_alone(changes, what):
    assert failed(verdict(replace(SAME, **changes))) == [what]


def test_the_bounds_are_those_of_the_config():
    shrunk = replace(SAME, new_rows=940, common=930)
    assert failed(verdict(shrunk, min_rows_share=0.9, min_kept_share=0.9)) == []


@pytest.mark.parametrize(
    ("before", "now", "users", "is_passed"),
    [
        (0.50, 0.47, 1000, True),  # 1.3 standard errors of the difference
        (0.50, 0.44, 1000, False),  # 2.7
        (0.50, 0.44, 200, True),  # 1.2
        (0.50, 0.60, 1000, True),
        (0.50, 0.4999, None, False),  # nothing is known of chance
    ],
)
def test_without_users_the_interval_is_binomial(before, now, users, is_passed):
    report = verdict(old=quality(before, users), new=quality(now, users))
    assert (failed(report) == []) is is_passed
    assert ("binomial" if users else "no number of users") in report.checks[0].detail


def test_the_same_users_show_a_drop_that_the_means_cannot(tmp_path):
    draw = np.random.default_rng(0)
    before = (draw.random(400) < 0.5).astype(np.float64)
    now = np.where(draw.random(400) < 0.04, 0, before)  # 2% of all lose their hit, nobody gains one
    for name, values in (("old", before), ("new", now)):
        write_matrix(tmp_path / name, unit_matrix(400, 8, seed=0), quality=values)
    old, new = quality(before.mean(), 400, tmp_path / "old"), quality(now.mean(), 400, tmp_path / "new")
    report = verdict(old=old, new=new)
    assert failed(report) == [METRIC]
    assert "bootstrap over 400 users measured in both" in report.checks[0].detail
    assert failed(verdict(old=quality(before.mean(), 400), new=quality(now.mean(), 400))) == []
    assert failed(verdict(old=old, new=new, max_drop=0.05)) == []


def test_users_that_only_one_version_measured_are_not_compared(tmp_path):
    for name, ids in (("old", range(200)), ("new", range(150, 350))):
        names = [f"user-{number}" for number in ids]
        write_matrix(tmp_path / name, unit_matrix(200, 8, seed=0), names, quality=np.ones(200))
    report = verdict(old=quality(1.0, 200, tmp_path / "old"), new=quality(1.0, 200, tmp_path / "new"))
    assert "binomial" in report.checks[0].detail  # 50 common users are too few


def test_a_figure_that_is_missing():
    assert failed(verdict(old=quality(None))) == []
    assert failed(verdict(new=quality(None))) == [METRIC]


def test_unrelated_tables_are_refused_and_retrained_ones_pass(tmp_path):
    vectors = unit_matrix(500, 16, seed=0)
    write_matrix(tmp_path / "old", vectors)
    write_matrix(tmp_path / "retrained", rotated(vectors, seed=3, noise=0.5))
    write_matrix(tmp_path / "unrelated", unit_matrix(500, 16, seed=9))
    report = verdict(compare(tmp_path / "old", tmp_path / "retrained"))
    assert failed(report) == []
    assert "neighbours" in failed(verdict(compare(tmp_path / "old", tmp_path / "unrelated")))
    assert '"overlap of neighbours"' in report.text()
