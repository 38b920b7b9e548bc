"""The report of continual cells: every score in the matrix, numbers on the page, and its files."""

from pathlib import Path
from xml.etree import ElementTree

import pyarrow.parquet as pq

from pipelines.continual_report import tasks_matrix, write_continual_report
from tests.support.cell_results import ORDER, result_of, results


def test_the_matrix_has_a_row_for_every_score() -> None:
    table = tasks_matrix(results())
    assert table.num_rows == 4 * 6 + 3
    [row] = [
        row for row in table.to_pylist() if (row["method"], row["seed"], row["j"], row["i"]) == ("teracon", 1, 2, 1)
    ]
    assert row["score"] == 0.33
    assert (row["order"], row["trained"], row["task"], row["metric"]) == (list(ORDER), "T3", "T2", "mrr_at_5")
    assert {row["j"] for row in table.to_pylist() if row["method"] == "mtl"} == {2}


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
