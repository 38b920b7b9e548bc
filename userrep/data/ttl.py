"""Task files of the official code (`i1,...,iL,,t1,t2,...`), in which the TTL data set is distributed to it.

Source: Sein-Kim/TERACON@b48e074:data_loader.py. Differs: a last line without newline keeps its last character; the
first item keeps a number of its own where no sequence is padded; later files may hold items and users that the first
one lacks, and the first task has them too; sequences of fewer than two items are left out and counted.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from userrep.data.tasks import (
    MIN_ITEMS,
    PAD,
    ItemSequences,
    Task,
    TaskKind,
    TaskSet,
    TaskSplit,
    is_left_padded,
    next_item_task,
    split_samples,
)

SEPARATOR = ",,"
MAX_NUMBER = 2**31 - 1


class TtlRows(NamedTuple):
    """A file as it stands.

    Attributes:
        items: item ids of each line, int32 (R, L), 0 is the pad.
        lines: 0-based line of each target, int64 (N,), ascending.
        targets: int64 (N,); none in the file of a first task.
    """

    items: np.ndarray
    lines: np.ndarray
    targets: np.ndarray


class TtlTask(NamedTuple):
    """A later task: its name, `item` or `label`, and its file."""

    name: str
    kind: TaskKind
    path: Path


def read_ttl(path: Path, has_targets: bool = True) -> TtlRows:
    """Reads the file of one task.

    Args:
        path: one user per line: items left-padded with 0 to one length and, after `,,`, one or more targets.
        has_targets: False for the file of the first task, whose lines are items alone.

    Raises:
        ValueError: a line that is not so, named by its number.
    """
    items, targets, lines, length = array("i"), array("q"), array("q"), 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            try:
                row, goals = _parse(line.rstrip("\n"), has_targets)
            except ValueError as error:
                raise ValueError(f"{path}, line {number + 1}: {error}") from None
            length = length or len(row)
            if len(row) != length:
                raise ValueError(f"{path}, line {number + 1}: {len(row)} items, but {length} in the lines before it")
            items.extend(row)
            targets.extend(goals)
            lines.extend([number] * len(goals))
    if not items:
        raise ValueError(f"{path} is empty: give a file with one user per line")
    found = np.frombuffer(items, dtype=np.int32).reshape(-1, length)
    bad = np.flatnonzero(~is_left_padded(found))
    if bad.size:
        raise ValueError(f"{path}, line {bad[0] + 1}: a pad (0) behind an item; pads must stand on the left")
    return TtlRows(found, np.array(lines, dtype=np.int64), np.array(targets, dtype=np.int64))


def _parse(line: str, has_targets: bool) -> tuple[list[int], list[int]]:
    """Items and targets of a line.

    Raises:
        ValueError: the line is neither.
    """
    source, separator, rest = line.partition(SEPARATOR)
    if bool(separator) != has_targets:
        problem = "no targets" if has_targets else "targets in the file of a first task"
        raise ValueError(f"{problem}: items{' and targets are' if has_targets else ' alone are'} expected")
    return _numbers(source), _numbers(rest) if has_targets else []


def _numbers(text: str) -> list[int]:
    fields = text.split(",")
    # Field by field only where something is wrong: a file has a hundred million fields.
    if text.isascii() and text.replace(",", "").isdecimal() and "" not in fields:
        numbers = list(map(int, fields))
        if max(numbers) <= MAX_NUMBER:
            return numbers
    bad = next(field for field in fields if not (field.isascii() and field.isdecimal() and int(field) <= MAX_NUMBER))
    raise ValueError(f"{bad[:40]!r} is no whole number from 0 to {MAX_NUMBER}; numbers are parted by commas")


def ttl_tasks(first: Path, later: Sequence[TtlTask], split: TaskSplit | None = None) -> TaskSet:
    """Tasks from the files of the official code. Users have no ids there: equal sequences are one user.

    Args:
        first: file of the first task, `T1`: sequences alone.
        later: the other tasks in their order.
        split: what to hold out; default: by user.

    Raises:
        ValueError: a malformed line, or files whose sequences differ in length.
    """
    split = split or TaskSplit()
    files = [read_ttl(first, has_targets=False), *(read_ttl(task.path) for task in later)]
    paths, length = [first, *(task.path for task in later)], files[0].items.shape[1]
    for path, file in zip(paths, files, strict=True):
        if file.items.shape[1] != length:
            raise ValueError(f"{path} has {file.items.shape[1]} items a line, {first} has {length}: they must agree")
    rows_by_key: dict[str, int] = {}
    parts, rows_of_lines, facts = [], [], {}
    for name, file in zip(["T1", *(task.name for task in later)], files, strict=True):
        is_usable = (file.items != PAD).sum(axis=1) >= MIN_ITEMS
        rows, new = _find_rows(file.items, is_usable, rows_by_key)
        parts.append(file.items[new])
        rows_of_lines.append(rows)
        facts |= {f"{name}_lines": len(rows), f"{name}_lines_without_history": int((~is_usable).sum())}
    raw = np.concatenate(parts)
    numbered = np.union1d([PAD], raw)  # the pad is smaller than every item
    sequences = ItemSequences(
        items=np.searchsorted(numbered, raw).astype(np.int32),
        user_ids=pa.array(list(rows_by_key), pa.string()),
        item_ids=("", *map(str, numbered[1:].tolist())),
    )
    tasks = [next_item_task("T1", sequences, split)]
    for task, file, rows in zip(later, files[1:], rows_of_lines[1:], strict=True):
        tasks.append(_task(task, file, rows, sequences, split))
    facts |= {"users": len(raw)} | {f"{task.name}_samples": len(task.rows) for task in tasks}
    return TaskSet(sequences, tuple(tasks), facts)


def _find_rows(items: np.ndarray, is_usable: np.ndarray, rows_by_key: dict[str, int]) -> tuple[np.ndarray, list[int]]:
    """Row of each line, -1 where unusable; and the lines that bring a new row, which are added to `rows_by_key`."""
    rows, new = np.full(len(items), -1, dtype=np.int64), []
    for line in np.flatnonzero(is_usable).tolist():
        # 64 bits: two of two million users share a key with a chance of 1e-7.
        key = blake2b(items[line].astype("<i4").tobytes(), digest_size=8).hexdigest()
        if key not in rows_by_key:
            new.append(line)
        rows[line] = rows_by_key.setdefault(key, len(rows_by_key))
    return rows, new


def _task(task: TtlTask, file: TtlRows, rows: np.ndarray, sequences: ItemSequences, split: TaskSplit) -> Task:
    """Samples in file order, one per line and target."""
    sample_rows = rows[file.lines]
    is_usable = sample_rows >= 0
    numbered, labels = np.unique(file.targets[is_usable], return_inverse=True)
    kept = sample_rows[is_usable]
    classes = tuple(map(str, numbered.tolist()))
    return Task(task.name, task.kind, kept, labels, classes, split_samples(kept, sequences.keys, split))
