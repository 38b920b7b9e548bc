"""Lessons that cells share: what is borrowed is what would have been taught, and nothing else is borrowed."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.distributed import run_ranks
from tests.support.tiny_cell import (
    ORDER,
    Points,
    assert_same_state,
    method_state,
    run_tiny,
    timeless,
    tiny_cell,
    tiny_tasks,
)
from userrep.data.tasks import ItemSequences, TaskSet
from userrep.manifest import read_manifest
from userrep.training.cell_points import Point
from userrep.training.cells import LESSON_FILE, METHOD_FILE, Cell, CellResult, read_cell
from userrep.training.continual import run_cell
from userrep.training.fence import StaleAttemptError

SIBLINGS = {"prefix": ORDER[:2], "reverse": ("T1", "T3", "T2"), "late": ("T2", "T1", "T3")}


def teach(cell: Cell, directory: Path, lenders: list[Path], tasks: TaskSet | None = None) -> tuple[CellResult, Points]:
    points = Points()
    return run_cell(cell, tasks or tiny_tasks(), directory, points, lenders=lenders), points


def taught_tasks(points: Points) -> list[str]:
    """Names of tasks that steps were taken for, in order."""
    return list(dict.fromkeys(point.tasks[0] for point in points.of("train/")))


def without_time(points: list[Point]) -> list[Point]:
    return [replace(p, metrics={k: v for k, v in p.metrics.items() if k != "time/epoch_s"}) for p in points]


def contents(directory: Path) -> dict[str, bytes]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def assert_same_lessons(own: Path, other: Path) -> None:
    assert timeless(read_cell(own)) == timeless(read_cell(other))
    for number in range(len(read_cell(own).lessons)):
        assert_same_state(method_state(own, number), method_state(other, number))


@pytest.mark.parametrize("name", ["teracon", "conure", "hat", "peterrec"])
def test_borrowed_lessons_are_those_that_would_be_taught(name: str, tmp_path: Path) -> None:
    cell = tiny_cell(name, seed=3, max_epochs=1)
    _, expected = run_tiny(cell, tmp_path / "alone")
    for sibling, order in SIBLINGS.items():
        run_tiny(cell.model_copy(update={"order": order}), tmp_path / sibling)
    for sibling, num_shared in {"prefix": 2, "reverse": 1, "late": 0}.items():
        own, lender = tmp_path / f"with-{sibling}", tmp_path / sibling
        _, points = teach(cell, own, [lender])
        assert_same_lessons(own, tmp_path / "alone")
        assert taught_tasks(points) == list(ORDER[num_shared:])
        # All points come, in their order and with their steps, but for the steps of lessons that were not taught.
        wanted = [p for p in expected if p.tasks[0] in ORDER[num_shared:] or "train/loss" not in p.metrics]
        assert without_time(points) == without_time(wanted)
        for number in range(3):
            manifest = read_manifest(own / f"task-{number:02d}")
            assert manifest.config == cell.model_dump(mode="json")
            assert manifest.facts == ({"borrowed_from": sibling} if number < num_shared else {})


def test_points_of_a_borrowed_lesson_have_the_time_that_it_took(tmp_path: Path) -> None:
    cell = tiny_cell("conure", ORDER[:2])
    _, expected = run_tiny(cell, tmp_path / "lender")
    result, points = teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert result == read_cell(tmp_path / "lender")
    assert list(points) == [point for point in expected if "train/loss" not in point.metrics]


def test_a_cell_that_has_some_lessons_borrows_the_next_ones(tmp_path: Path) -> None:
    cell = tiny_cell("hat", max_epochs=1)
    run_tiny(cell, tmp_path / "alone")
    run_tiny(cell.until(2), tmp_path / "lender")
    with pytest.raises(InterruptedError):
        run_cell(cell, tiny_tasks(), tmp_path / "own", Points(stop_at="T2"))
    _, points = teach(cell, tmp_path / "own", [tmp_path / "own", tmp_path / "missing", tmp_path / "lender"])
    assert {point.tasks for point in points} == {("T2",), ("T3",)}
    assert taught_tasks(points) == ["T3"]
    assert_same_lessons(tmp_path / "own", tmp_path / "alone")


@pytest.mark.parametrize("damaged", [METHOD_FILE, LESSON_FILE, "manifest.json", None])
def test_what_is_damaged_is_not_lent_and_another_may_have_it(damaged: str | None, tmp_path: Path) -> None:
    cell = tiny_cell("peterrec", max_epochs=1)
    run_tiny(cell, tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "lender")
    if damaged is None:
        shutil.rmtree(tmp_path / "lender" / "task-01")
    else:
        path = tmp_path / "lender" / "task-01" / damaged
        path.write_bytes(path.read_bytes()[:-20])
    _, points = teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert taught_tasks(points) == ["T2", "T3"]
    assert_same_lessons(tmp_path / "own", tmp_path / "alone")
    _, points = teach(cell, tmp_path / "rich", [tmp_path / "lender", tmp_path / "alone"])
    assert taught_tasks(points) == []
    assert_same_lessons(tmp_path / "rich", tmp_path / "alone")


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"options": {"sparsity_weight": 0.5}},
        {"method": "fineall"},
        {"training": tiny_cell(max_epochs=2).training},
    ],
)
def test_another_cell_lends_nothing(other: dict[str, Any], tmp_path: Path) -> None:
    cell = tiny_cell("hat", ORDER[:2], max_epochs=1)
    run_tiny(cell.model_copy(update=other), tmp_path / "lender")
    _, points = teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert taught_tasks(points) == ["T1", "T2"]


def other_items(tasks: TaskSet) -> TaskSet:
    items = tasks.sequences.items.copy()
    items[0, -1] = items[0, -1] % 12 + 1
    return replace(tasks, sequences=ItemSequences(items, tasks.sequences.user_ids, tasks.sequences.item_ids))


def other_labels(tasks: TaskSet) -> TaskSet:
    """Of T2."""
    first, task, last = tasks.tasks
    labels = (task.labels + np.eye(1, len(task.labels), dtype=np.int64)[0]) % task.num_classes
    return replace(tasks, tasks=(first, replace(task, labels=labels), last))


def other_split(tasks: TaskSet) -> TaskSet:
    """Of T1."""
    first, *rest = tasks.tasks
    split = first.split.copy()
    split[split == 2] = 1
    split[:2] = 2
    return replace(tasks, tasks=(replace(first, split=split), *rest))


@pytest.mark.parametrize(
    ("change", "taught"), [(other_items, ORDER), (other_split, ORDER), (other_labels, ("T2", "T3"))]
)
def test_other_data_are_lent_up_to_the_first_task_that_differs(
    change: Callable[[TaskSet], TaskSet], taught: tuple[str, ...], tmp_path: Path
) -> None:
    cell = tiny_cell("fineall", max_epochs=1)
    run_cell(cell, change(tiny_tasks()), tmp_path / "lender", Points())
    _, points = teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert taught_tasks(points) == list(taught)


def test_a_joint_method_neither_borrows_nor_lends(tmp_path: Path) -> None:
    cell = tiny_cell("mtl", max_epochs=1)
    for order in (ORDER[:1], ORDER, ORDER[:2]):
        lenders = sorted(tmp_path.iterdir())
        result, points = teach(cell.model_copy(update={"order": order}), tmp_path / str(len(lenders)), lenders)
        assert result.is_complete
        assert [lesson.tasks for lesson in result.lessons] == [order]
        assert {point.tasks for point in points.of("train/")} == {order}


def test_interrupted_anywhere_borrowing_goes_on(tmp_path: Path) -> None:
    """Each lesson of one epoch tells three points: two of validation, one at its end."""
    cell = tiny_cell("fineall", max_epochs=1)
    run_tiny(cell, tmp_path / "lender")
    for num_told in range(1, 10):
        own, told = tmp_path / f"after-{num_told}", []

        def report(point: Point, told: list[Point] = told, last: int = num_told) -> None:
            told.append(point)
            if len(told) == last:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run_cell(cell, tiny_tasks(), own, report, lenders=[tmp_path / "lender"])
        assert len(list(own.glob("task-*"))) == (num_told - 1) // 3
        _, points = teach(cell, own, [tmp_path / "lender"])
        assert taught_tasks(points) == []
        assert len(points) == 9 - (num_told - 1) // 3 * 3
        assert_same_lessons(own, tmp_path / "lender")


def test_interrupted_while_it_copies_a_cell_has_all_of_a_lesson_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = tiny_cell("fineall", ORDER[:2], max_epochs=1)
    run_tiny(cell, tmp_path / "lender")
    copy, copied = shutil.copyfile, []

    def copy_three(source: Path, target: Path) -> None:
        copied.append(target)
        if len(copied) == 4:
            target.write_bytes(b"half")
            raise OSError("no space left")
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", copy_three)
    with pytest.raises(OSError, match="no space"):
        teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert len(read_cell(tmp_path / "own").lessons) == 1
    teach(cell, tmp_path / "own", [tmp_path / "lender"])
    assert_same_lessons(tmp_path / "own", tmp_path / "lender")


@pytest.mark.parametrize("num_allowed", range(4))
def test_who_may_not_write_changes_nothing(num_allowed: int, tmp_path: Path) -> None:
    """Of changes to the directory there are four: removal, two lessons that are borrowed, one that is taught."""
    cell, own, seen = tiny_cell("fineall", max_epochs=1), tmp_path / "own", []
    run_tiny(cell.until(2), tmp_path / "lender")
    run_tiny(cell, own)
    (own / "task-00" / METHOD_FILE).unlink()

    def check() -> None:
        seen.append(contents(own))
        if len(seen) > num_allowed:
            raise StaleAttemptError

    with pytest.raises(StaleAttemptError), pytest.warns(UserWarning, match="lesson passed over"):
        run_cell(cell, tiny_tasks(), own, Points(), lenders=[tmp_path / "lender"], check=check)
    assert contents(own) == seen[-1]
    left = sorted(path.name for path in own.iterdir())
    assert left == [["task-00", "task-01", "task-02"], [], ["task-00"], ["task-00", "task-01"]][num_allowed]


def _borrow_on_a_rank(_rank: int, root: str) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    cell = tiny_cell("hat", max_epochs=1)
    run_tiny(cell.until(2), Path(root, "lender"))
    result, points = teach(cell, Path(root, "own"), [Path(root, "lender")])
    return timeless(result), taught_tasks(points), [point.tasks[0] for point in points.of("test/")]


def test_all_ranks_go_on_from_what_the_first_one_has_borrowed(tmp_path: Path) -> None:
    ranks = run_ranks(_borrow_on_a_rank, 2, str(tmp_path))
    assert ranks[0][0] == ranks[1][0] == timeless(read_cell(tmp_path / "own"))
    assert [taught for _, taught, _ in ranks] == [["T3"], ["T3"]]
    assert [told for _, _, told in ranks] == [["T1", "T2", "T3"], ["T3"]]
    first = read_cell(tmp_path / "lender").lessons
    assert read_cell(tmp_path / "own").lessons[:2] == first


def test_a_cell_until_a_task_has_the_order_up_to_it() -> None:
    cell = tiny_cell("hat", seed=4, sparsity_weight=0.5)
    assert cell.until(2) == tiny_cell("hat", ORDER[:2], seed=4, sparsity_weight=0.5)
    assert cell.until(3) == cell
