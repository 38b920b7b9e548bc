"""The report of continual cells: every score in the matrix, numbers on the page, and its files."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import stats

from pipelines.continual_groups import group_cells
from pipelines.continual_report import Popularity, format_groups, outcome_metrics, tasks_matrix, write_continual_report
from tests.support.cell_results import ORDER, result_of, results
from userrep.training.cells import CellResult, EpochScore

POPULARITY = {0: {"T1": 0.02, "T2": 0.05, "T3": 0.4}, 1: {"T1": 0.04, "T2": 0.05}, 7: {"T1": 0.9}}


def page(cells: list[CellResult], popularity: Popularity | None = None) -> list[str]:
    return format_groups(group_cells(cells), popularity or {}).splitlines()


def table(lines: list[str], title: str) -> list[list[str]]:
    """Cells of the first table below a line that starts so; none where there is no such line."""
    starts = [number for number, line in enumerate(lines) if line.startswith(title)]
    rows = []
    for line in lines[starts[0] + 2 :] if starts else []:
        if not line:
            break
        rows.append([value.strip() for value in line.strip("|").split("|")])
    return rows[:1] + rows[2:]


def finals(method: str, by_seed: list[list[float]], first_seed: int = 0) -> list[CellResult]:
    """Cells of a joint method with these final scores."""
    return [result_of(method, [scores], seed) for seed, scores in enumerate(by_seed, first_seed)]


def test_the_matrix_has_a_row_for_every_score() -> None:
    table = tasks_matrix(results())
    assert table.num_rows == 4 * 6 + 3
    [row] = [
        row for row in table.to_pylist() if (row["method"], row["seed"], row["j"], row["i"]) == ("teracon", 1, 2, 1)
    ]
    assert row["score"] == 0.33
    assert (row["order"], row["trained"], row["task"], row["metric"]) == (list(ORDER), "T3", "T2", "mrr_at_5")
    assert {row["j"] for row in table.to_pylist() if row["method"] == "mtl"} == {2}


def test_the_page_of_a_pretrained_encoder(tmp_path: Path) -> None:
    order = ("universal", "T2")
    cells = [result_of(name, [[0.5], [0.4, 0.2]], seed, order) for name in ("sinmo", "hat") for seed in range(2)]
    write_continual_report(cells, {0: {"T2": 0.1}}, tmp_path)
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    assert table(lines, "Scores")[:2] == [
        ["method", "seeds", "universal R@10", "T2 MRR@5"],
        ["popularity", "1", "-", "0.1000"],
    ]
    assert table(lines, "Seconds")[1:] == [["sinmo", "2", "-", "1.00 +- 0.00"], ["hat", "2", "-", "1.00 +- 0.00"]]
    assert outcome_metrics(cells, order)["backward_transfer/universal/hat"] == pytest.approx(-20)
    metrics = {row["metric"] for row in pq.read_table(tmp_path / "tasks_matrix.parquet").to_pylist()}
    assert metrics == {"recall_at_10", "mrr_at_5"}


def test_the_page_and_the_figures(tmp_path: Path) -> None:
    cells = [*results(), result_of("teracon", [[0.1], [0.1, 0.7], [0.1, 0.7, 0.3]], order=ORDER[::-1], sampling="all")]
    write_continual_report(cells, POPULARITY, tmp_path)
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
    write_continual_report(cells, POPULARITY, tmp_path)  # equal input, equal bytes
    assert drawn == {path.stem: path.read_bytes() for path in (tmp_path / "figures").iterdir()}


def test_an_experiment_of_a_joint_method_alone(tmp_path: Path) -> None:
    write_continual_report([results()[-1]], {}, tmp_path)
    lines = (tmp_path / "tasks.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("|")] == [
        "| method | seeds | T1 MRR@5 | T2 MRR@5 | T3 ACC |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| mtl | 1 | 0.1100 | 0.2200 | 0.5500 |",
    ]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["scores-order1-mtl.svg"]


def test_popularity_is_over_the_seeds_of_an_order() -> None:
    other = result_of("hat", [[0.1], [0.1, 0.7]], order=("T2", "T1"))
    lines = page([*results(), other], POPULARITY)
    rows = [line for line in lines if line.startswith("| popularity")]
    # Half of the interval of two values a, b is 12.706 |a - b| / 2; T3 is not known for both seeds.
    assert rows == [
        "| popularity | 2 | 0.0300 +- 0.1271 | 0.0500 +- 0.0000 | - |",
        "| popularity | 1 | 0.0500 | 0.0200 |",
    ]
    assert not any(line.startswith("| popularity") for line in page(results(), {7: POPULARITY[7]}))


def test_differences_are_of_the_same_seeds() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal([0.5, 0.1, 0.3], 0.01, (4, 3)), rng.normal([0.4, 0.1, 0.4], 0.01, (4, 3))
    cells = [
        *finals("hat", other[[1, 2, 3]].tolist(), first_seed=1),  # what came first is not what others are compared with
        *finals("teracon", own.tolist()),
        *finals("conure", [[0.1, 0.2, 0.3]]),  # one seed tells nothing
        *[result_of("teracon", [scores], seed, sampling="all") for seed, scores in enumerate(own.tolist())],
    ]
    head, hat, variant = table(page(cells), "Final scores of teracon minus")
    assert head == ["method", "seeds", "T1 MRR@5", "T2 MRR@5", "T3 ACC"]
    assert hat[:2] == ["hat", "3"]
    assert variant == ["teracon(sampling=all)", "4", *["+0.0000 +- 0.0000"] * 3]
    for task, value in enumerate(hat[2:]):
        test = stats.ttest_rel(own[1:, task], other[1:, task])
        low, high = test.confidence_interval(0.95)
        mean, reach = value.removesuffix(" *").split(" +- ")
        assert float(mean) == pytest.approx((low + high) / 2, abs=1e-4)
        assert float(reach) == pytest.approx((high - low) / 2, abs=1e-4)
        assert value.endswith(" *") == (test.pvalue < 0.05)
    assert [value.endswith(" *") for value in hat[2:]] == [True, False, True]


def test_there_are_no_differences_to_a_method_that_was_not_run() -> None:
    variant = [result_of("teracon", [[0.1, 0.2, 0.3]], seed, sampling="all") for seed in range(2)]
    for cells in (finals("hat", [[0.1, 0.2, 0.3]] * 2) + variant, finals("teracon", [[0.1, 0.2, 0.3]] * 2)):
        assert table(page(cells), "Final scores of") == []


def test_time_is_that_of_an_epoch_of_each_task() -> None:
    def timed(seed: int, seconds: dict[str, list[float]]) -> CellResult:
        """Of two phases; what stands at epoch 0 is no training."""
        result = result_of("conure", [[0.1], [0.1, 0.2]], seed, ("T1", "T2"))
        lessons = []
        for lesson, times in zip(result.lessons, seconds.values(), strict=True):
            points = [
                EpochScore(phase=phase, epoch=epoch, scores=dict.fromkeys(lesson.tasks, 0.1), losses={}, seconds=time)
                for phase in ("train", "retrain")
                for epoch, time in enumerate([1e6, *times])
            ]
            lessons.append(lesson.model_copy(update={"curve": tuple(points)}))
        return replace(result, lessons=tuple(lessons))

    joint = result_of("mtl", [[0.1, 0.2]], order=("T1", "T2"))
    cells = [timed(0, {"T1": [1, 2], "T2": [0.5]}), timed(1, {"T1": [2.5, 3, 2, 2.5], "T2": [0.25, 0.75]}), joint]
    rows = table(page(cells), "Seconds of training per epoch")
    # Means of the seeds are 1.5 and 2.5, so half of the interval is 12.706 / 2; a seed counts once, however long.
    assert rows == [["method", "seeds", "T1", "T2"], ["conure", "2", "2.00 +- 6.35", "0.50 +- 0.00"]]


def test_metrics_of_the_outcome_are_means_of_one_order() -> None:
    reverse = result_of("teracon", [[0.9], [0.9, 0.8], [0.9, 0.8, 0.7]], order=ORDER[::-1])
    variant = result_of("teracon", [[0.1], [0.1, 0.7], [0.1, 0.7, 0.3]], sampling="all", max_scale=1e-05)
    metrics = outcome_metrics([*results(), reverse, variant], ORDER)
    assert {name: value for name, value in metrics.items() if name.endswith("/teracon")} == pytest.approx(
        {
            **{"final/T1/teracon": 0.10, "final/T2/teracon": 0.30, "final/T3/teracon": 0.5},
            **{"forward_transfer/T2/teracon": (50 + 25) / 2, "forward_transfer/T3/teracon": (-20 + 20) / 2},
            **{"backward_transfer/T1/teracon": (20 - 20) / 2, "backward_transfer/T2/teracon": (-10 + 10) / 2},
        },
        abs=1e-9,
    )
    assert {name for name in metrics if name.endswith("/mtl")} == {f"final/{task}/mtl" for task in ORDER}
    assert metrics["final/T2/teracon-max-scale-1e-05-sampling-all"] == 0.7
    assert all(re.fullmatch(r"[\w.\- /]+", name) for name in metrics)  # what MLflow takes
    assert len({name.split("/")[2] for name in metrics}) == 4
    assert outcome_metrics([reverse], ORDER) == {}
