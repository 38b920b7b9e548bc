"""A committed table without some users, in place of the one with them, in one step.

Killed at any point, a table is the old one or the new one, and the next call finishes or repeats what was begun.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from userrep.manifest import (
    ERASED_FROM_FACT,
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    contained_path,
    describe_file,
    read_manifest,
    write_manifest,
)


@dataclass(frozen=True)
class Erased:
    """A table without the users, in a staging directory, its manifest not yet written.

    Attributes:
        manifest: of the new table.
        num_rows: rows that are gone, of all its files.
    """

    manifest: Manifest
    num_rows: int


@dataclass(frozen=True)
class Rewritten:
    """What became of a table: for the log.

    Attributes:
        num_rows: rows that are gone.
        files: path, old and new sha256 of every file that changed; None where there is none.
        old_digest: of its manifest.
        new_digest: likewise.
    """

    num_rows: int
    files: tuple[tuple[str, str | None, str | None], ...]
    old_digest: str
    new_digest: str


# Writes the files of a table that change to a staging directory; None: the table has none of the users.
Eraser = Callable[[Path, Path, Manifest, pa.Array], Erased | None]
# Writes a file without the users, and returns how many rows that took away; 0 writes nothing.
Rewriter = Callable[[Path, Path, pa.Array], int]


def erase_table(directory: Path, ids: pa.Array, eraser: Eraser) -> Rewritten | None:
    """Replaces a committed table by one without some users; None where it has none of them.

    Args:
        directory: of the table.
        ids: of the users, strings.
        eraser: of this kind of table.

    Raises:
        IncompleteTableError: there is no committed table.
    """
    recover(directory)
    manifest, staging = read_manifest(directory), _staging(directory)
    staging.mkdir()
    erased = eraser(directory, staging, manifest, ids)
    if erased is None:
        shutil.rmtree(staging)
        return None
    new = with_lineage(erased.manifest, manifest)
    for entry in new.files:
        if not contained_path(staging, entry.path).exists():
            link_or_copy(contained_path(directory, entry.path), contained_path(staging, entry.path))
    write_manifest(staging, new)
    _swap(directory, staging)
    return Rewritten(erased.num_rows, changes(manifest, new), manifest.digest(), new.digest())


def recover(directory: Path) -> None:
    """Ends what a killed erasure has left of a table: the complete one takes its place, the rest goes."""
    staging, superseded = _staging(directory), _superseded(directory)
    if not directory.exists() and (staging / MANIFEST_NAME).is_file():
        os.replace(staging, directory)
    elif not directory.exists() and superseded.exists():
        os.replace(superseded, directory)
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(superseded, ignore_errors=True)


def interrupted(workdir: Path, max_depth: int = 1) -> list[Path]:
    """Tables of which a killed erasure has left anything beside them, so many levels below a directory at most."""
    left = [p for suffix in SUFFIXES for depth in range(max_depth) for p in workdir.glob("*/" * depth + f".*{suffix}")]
    return sorted({path.with_name(path.stem.removeprefix(".")) for path in left})


def erase_files(
    directory: Path, staging: Path, entries: Sequence[FileEntry], ids: pa.Array, rewriter: Callable[[str], Rewriter]
) -> tuple[tuple[FileEntry, ...], int]:
    """Writes those files of a table that change. Returns the entries of all, and how many rows are gone.

    Args:
        directory: of the table.
        staging: where the new files go.
        entries: of the table's files.
        ids: of the users.
        rewriter: for a file of this path.
    """
    kept, num_rows = list[FileEntry](), 0
    for entry in entries:
        target = contained_path(staging, entry.path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if found := rewriter(entry.path)(contained_path(directory, entry.path), target, ids):
            rows = None if entry.rows is None else entry.rows - found
            entry = describe_file(staging, target, rows)
            num_rows += found
        kept.append(entry)
    return tuple(kept), num_rows


def keep(source: Path, target: Path, ids: pa.Array) -> int:
    """Rewriter of files that name no user."""
    return 0


def with_lineage(new: Manifest, old: Manifest) -> Manifest:
    """The new manifest, which says whose place it takes: what was made of the old table is not out of date by that."""
    return new.model_copy(update={"facts": {**new.facts, ERASED_FROM_FACT: old.lineage()}})


def changes(old: Manifest, new: Manifest) -> tuple[tuple[str, str | None, str | None], ...]:
    """Path, old and new sha256 of the files in which two manifests differ."""
    before, after = ({entry.path: entry.sha256 for entry in one.files} for one in (old, new))
    paths = sorted(before.keys() | after.keys())
    return tuple((path, before.get(path), after.get(path)) for path in paths if before.get(path) != after.get(path))


def link_or_copy(source: Path, target: Path) -> None:
    """A file that does not change, in a second table."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


SUFFIXES = (".erasing", ".unerased")


def _staging(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{SUFFIXES[0]}")


def _superseded(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}{SUFFIXES[1]}")


def _swap(directory: Path, staging: Path) -> None:
    superseded = _superseded(directory)
    os.replace(directory, superseded)
    os.replace(staging, directory)
    shutil.rmtree(superseded)
