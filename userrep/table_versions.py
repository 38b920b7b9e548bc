"""Tables that can be replaced: in object storage, a pointer to one of several versions (`storage.py`)."""

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from userrep import objects
from userrep.manifest import MANIFEST_NAME, IncompleteTableError, staged_directory
from userrep.mirror import object_name, shown
from userrep.storage import directories, fetch, push, remove

CURRENT = "CURRENT"
VERSION = re.compile(r"version-\d+")
UNUSED_S = 24 * 3600  # after which a node forgets its copy of a version that has a newer one


def current(table: Path) -> Path:
    """The directory of a table's committed version, not fetched; the table itself where it has no versions.

    Raises:
        IncompleteTableError: its pointer is damaged.
    """
    if (name := object_name(table)) is None:
        return table
    try:
        version = objects.read_object(f"{name}/{CURRENT}").decode(errors="replace")
    except FileNotFoundError:
        return table
    if not VERSION.fullmatch(version):
        raise IncompleteTableError(f"{shown(table)}/{CURRENT} is damaged; delete it and rerun the stage of the table")
    return table / version


def open_table(table: Path) -> Path:
    """As `current`, fetched where there is one. A table that is replaced meanwhile is read as it is then."""
    while (version := current(table)) != table:
        try:
            fetch(version)
        except IncompleteTableError:
            if current(table) == version:
                raise
        else:
            _forget_unused(version)
            return version
    return table


@contextmanager
def staged_table(table: Path, stages_itself: bool = False) -> Iterator[Path]:
    """As `staged_directory`, for a table that may live in object storage: gives the directory to be filled.

    When the block ends, what the store lacks of the manifest's files is uploaded, and the pointer moves. What an
    interrupted attempt has left is removed at the next one.

    Args:
        table: maybe in object storage.
        stages_itself: what fills the directory replaces a local one in one step by its own means.
    """
    if (name := object_name(table)) is None and stages_itself:
        yield table
        return
    if name is None:
        with staged_directory(table) as staging:
            yield staging
        return
    kept = current(table)
    _remove_versions(table, {kept})
    version = table / f"version-{time.time_ns()}"
    version.mkdir(parents=True)
    yield version
    if not (version / MANIFEST_NAME).is_file():
        raise IncompleteTableError(f"nothing was committed to {version}: a stage must write its manifest last")
    push(version)
    objects.write_object(f"{name}/{CURRENT}", version.name.encode())
    _remove_versions(table, {version})


def _remove_versions(table: Path, kept: set[Path]) -> None:
    local = {path for path in table.glob("version-*") if path.is_dir()}
    for path in {*directories(table, "version-*"), *local} - kept:
        remove(path)


def _forget_unused(version: Path) -> None:
    """Removes this node's copies of versions that have long been superseded; they cost disk and nothing else."""
    for path in version.parent.glob(f"version-*/{MANIFEST_NAME}"):
        if path.parent != version and path.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(path.parent)
