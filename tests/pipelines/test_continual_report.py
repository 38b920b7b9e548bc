"""The report of continual cells: its numbers against a plain re-statement, and what it refuses."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.continual_report import group_cells, single_scores, tasks_matrix, write_continual_report
from userrep.training.cells import Cell, CellResult, EpochScore, Lesson

ORDER = ("T1", "T2", "T3")
METRICS = {"T1": "mrr_at_5", "T2": "mrr_at_5", "T3": "accuracy", "noise": "accuracy"}


def result_of(
    method: str, scores: list[list[float]], seed: int = 0, order: tuple[str, ...] = ORDER, **options: object
) -> CellResult:
    """A cell with rows of R; one row is a joint method's."""
    lessons = []
    for place, row in enumerate(scores):
        taught = order if len(scores) == 1 else order[place : place + 1]
        curve = [
            EpochScore(
                phase="train",
                epoch=e,
                scores=dict.fromkeys(taught, 0.1 * e),
                losses=dict.fromkeys(taught, 2.0),
                seconds=1,
            )
            for e in range(3)
        ]
        lessons.append(
            Lesson.parse(
                {
                    "tasks": taught,
                    "scores": dict(zip(order, row, strict=False)),
                    "metrics": {name: METRICS[name] for name in order[: len(row)]},
                    "curve": curve,
                    "similarity": np.eye(len(row)).tolist() if method == "teracon" else None,
                    "num_steps": 5 * (place + 1),
                    "seconds": 2.0,
                }
            )
        )
    return CellResult(Cell(method=method, order=order, seed=seed, options=dict(options)), tuple(lessons))


def results() -> list[CellResult]:
    return [
        result_of("sinmo", [[0.10], [0.10, 0.20], [0.10, 0.20, 0.5]], seed=0),
        result_of("sinmo", [[0.12], [0.12, 0.24], [0.12, 0.24, 0.5]], seed=1),
        result_of("teracon", [[0.10], [0.09, 0.30], [0.08, 0.33, 0.6]], seed=1),
        result_of("teracon", [[0.10], [0.11, 0.30], [0.12, 0.27, 0.4]], seed=0),
        result_of("mtl", [[0.11, 0.22, 0.55]], seed=0),
    ]


def test_the_matrix_has_a_row_for_every_score() -> None:
    table = tasks_matrix(results())
    assert table.num_rows == 4 * 6 + 3
    [row] = [
        row for row in table.to_pylist() if (row["method"], row["seed"], row["j"], row["i"]) == ("teracon", 1, 2, 1)
    ]
    assert row["score"] == 0.33
    assert (row["order"], row["trained"], row["task"], row["metric"]) == (list(ORDER), "T3", "T2", "mrr_at_5")
    assert {row["j"] for row in table.to_pylist() if row["method"] == "mtl"} == {2}


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


def test_the_page_and_the_figures(tmp_path: Path) -> None:
    cells = [*results(), result_of("teracon", [[0.1], [0.1, 0.7], [0.1, 0.7, 0.3]], order=ORDER[::-1], sampling="all")]
    write_continual_report(cells, tmp_path)
    assert pq.read_table(tmp_path / "tasks_matrix.parquet").equals(tasks_matrix(cells))
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    assert "| method | seeds | T1 MRR@5 | T2 MRR@5 | T3 ACC |" in lines
    assert "| teracon | 2 | 0.1000 +- 0.2541 | 0.3000 +- 0.3812 | 0.5000 +- 1.2706 |" in lines
    assert "| mtl | 1 | 0.1100 | 0.2200 | 0.5500 |" in lines
    assert "| teracon(sampling=all) | 1 | 0.1000 | 0.7000 | 0.3000 |" in lines
    assert any(line.startswith("| teracon FWT | 2 | - | +37.50 +- ") for line in lines)
    assert not any(line.startswith(("| mtl BWT", "| sinmo FWT")) for line in lines)
    figures = sorted(path.stem for path in (tmp_path / "figures").iterdir())
    assert figures == [
        *("adaptation-order1", "adaptation-order2", "forgetting-order1", "forgetting-order2"),
        *("masks-order1-teracon", "masks-order2-teracon-sampling-all"),
        *("scores-order1-mtl", "scores-order1-sinmo", "scores-order1-teracon", "scores-order2-teracon-sampling-all"),
    ]
    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert b"0.3000" in drawn["scores-order1-teracon"]
    for svg in drawn.values():
        ElementTree.fromstring(svg)
    write_continual_report(cells, tmp_path)  # equal input, equal bytes
    assert drawn == {path.stem: path.read_bytes() for path in (tmp_path / "figures").iterdir()}


def test_an_experiment_of_a_joint_method_alone(tmp_path: Path) -> None:
    write_continual_report([results()[-1]], tmp_path)
    assert "transfer" not in (tmp_path / "tasks.md").read_text()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["scores-order1-mtl.svg"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="no cell"):
        group_cells([])
    with pytest.raises(ValueError, match=r"teracon, order T1 > T2 > T3, seed 0 has 2 of its lessons"):
        group_cells([result_of("teracon", [[0.1], [0.1, 0.2]])])
    with pytest.raises(ValueError, match="is there twice"):
        group_cells([results()[0], results()[0]])
