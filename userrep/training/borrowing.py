"""Lessons that a cell need not be taught, because another one was.

A lesson is a function of method, options, seed and training, and of the tasks so far, their order and their data: what
comes later does not reach back. So cells whose orders begin alike have equal lessons so far, bit for bit on as many
ranks and the same kind of device (of others see `continual.py`). An order and its reverse share the first task, an
order with a noise task in it shares what is before that. A joint method has one lesson of all tasks, and shares none.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from userrep.config import ConfigError
from userrep.manifest import (
    IncompleteTableError,
    contained_path,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.training.cell_points import Report, lesson_points
from userrep.training.cells import LESSON_FILE, Cell, Lesson, lesson_directory


def borrow_lessons(
    directory: Path,
    cell: Cell,
    data_digests: tuple[str, ...],
    lessons: tuple[Lesson, ...],
    lenders: Sequence[Path],
    report: Report,
    check: Callable[[], None],
) -> int:
    """Copies lessons of other cells, one after another, up to the first one that none of them has.

    Each is committed on its own, so an interrupted call can be made again with what is there then.

    Args:
        directory: of the cell, to which lessons are committed.
        cell: whose method is not joint.
        data_digests: of its tasks, from `digest_prefixes`.
        lessons: that it has.
        lenders: directories of cells, of whichever.
        report: is told what was told of each lesson, before it is committed.
        check: is called right before anything is written.

    Returns:
        How many were copied.
    """
    num_steps = lessons[-1].num_steps if lessons else 0
    for number in range(len(lessons), len(cell.order)):
        places = (lesson_directory(lender, number) for lender in lenders)
        source = next((place for place in places if _has(place, cell.until(number + 1), data_digests[number])), None)
        if source is None:
            return number - len(lessons)
        lesson = Lesson.model_validate_json((source / LESSON_FILE).read_bytes())
        for point in lesson_points(lesson, num_steps):
            report(point)
        check()
        _copy(source, lesson_directory(directory, number), cell)
        num_steps = lesson.num_steps
    return len(cell.order) - len(lessons)


def _has(place: Path, cell: Cell, data_digest: str) -> bool:
    """Whether there is the last lesson of a cell, intact."""
    try:
        manifest = read_manifest(place)
        other = Cell.parse(manifest.config).until(len(cell.order))
        if other.identity() != cell.identity() or manifest.inputs != {"tasks": data_digest}:
            return False
        verify_files(place, manifest)
    except (IncompleteTableError, ConfigError):
        return False  # who reads the lender itself is warned of what is damaged
    return True


def _copy(source: Path, target: Path, cell: Cell) -> None:
    manifest = read_manifest(source)
    facts = {"borrowed_from": source.parent.name}
    with staged_directory(target) as staging:
        for entry in manifest.files:
            shutil.copyfile(contained_path(source, entry.path), contained_path(staging, entry.path))
        write_manifest(staging, manifest.model_copy(update={"config": cell.identity(), "facts": facts}))
