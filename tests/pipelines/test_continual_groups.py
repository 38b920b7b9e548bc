"""Cells side by side: transfer against a plain re-statement, and what cannot be compared."""

import numpy as np
import pytest

from pipelines.continual_groups import group_cells, single_scores
from tests.support.cell_results import ORDER, result_of, results


def test_transfer_is_over_the_same_seed() -> None:
    groups = {group.label: group for group in group_cells(results())}
    teracon = groups["teracon"]
    assert [result.cell.seed for result in teracon.results] == [0, 1]
    # Student's t of one degree of freedom, at 97.5%: 12.706; of two values a, b the error is |a - b| / 2.
    assert teracon.final.mean == pytest.approx([0.10, 0.30, 0.5])
    assert teracon.final.high - teracon.final.mean == pytest.approx(12.706 * np.array([0.02, 0.03, 0.1]), rel=1e-4)
    assert teracon.forward.mean[1:] == pytest.approx([(50 + 25) / 2, (-20 + 20) / 2])
    assert teracon.backward.mean[:2] == pytest.approx([(20 - 20) / 2, (-10 + 10) / 2])
    assert np.isnan([teracon.forward.mean[0], teracon.backward.mean[2]]).all()
    assert np.isnan(groups["sinmo"].forward.mean).all()
    assert groups["sinmo"].backward.mean[:2] == pytest.approx([0, 0])
    assert np.isnan(groups["mtl"].backward.mean).all()
    assert groups["mtl"].is_joint


def test_without_single_models_there_is_no_forward_transfer() -> None:
    [group] = group_cells([results()[2]])
    assert np.isnan(group.forward.mean).all()
    assert np.isfinite(group.backward.mean[:2]).all()


def test_scores_of_tasks_alone_come_from_the_same_order_if_they_can() -> None:
    other = result_of("sinmo", [[0.9], [0.9, 0.8], [0.9, 0.8, 0.7]], order=("T1", "noise", "T2"))
    alone = [results()[0], other]
    assert single_scores(alone, ("T1", "noise", "T2"), 0) == pytest.approx([0.9, 0.8, 0.7])
    assert single_scores(alone, ("T1", "noise", "T3"), 0) == pytest.approx([0.9, 0.8, 0.5])
    assert single_scores(alone, ORDER, 0) == pytest.approx([0.1, 0.2, 0.5])
    assert np.isnan(single_scores(alone, ORDER, 7)).all()


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="no cell"):
        group_cells([])
    with pytest.raises(ValueError, match=r"teracon, order T1 > T2 > T3, seed 0 has 2 of its lessons"):
        group_cells([result_of("teracon", [[0.1], [0.1, 0.2]])])
    with pytest.raises(ValueError, match="is there twice"):
        group_cells([results()[0], results()[0]])
