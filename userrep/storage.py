"""Directories that live in object storage: every node works in a mirror of the bucket, and objects are the truth.

A path may be a mirror (`mirror.py`); every function here does nothing for one that is not, or what it would do on a
local or shared disk.

1. A directory is committed by its `manifest.json`, which is uploaded last and removed first. It never changes.
2. A table that can be replaced is a pointer, the object `CURRENT`, to one of its versions, each such a directory. One
   PUT moves it, so a reader sees the old table or the new one; then the others are deleted.
3. `fetch` gives a verified local copy, made once for all processes of a node, under a lock.
4. Tasks on several nodes fill a version together: `send` what they have written, `receive` what others have.
5. A log is a sequence of pieces, each an object named by attempt and offset; nothing is appended to or renamed.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from userrep import objects
from userrep.config import ConfigError
from userrep.manifest import (
    MANIFEST_NAME,
    FileEntry,
    IncompleteTableError,
    Manifest,
    contained_path,
    parse_manifest,
    read_manifest,
    sha256_file,
    staged_directory,
)
from userrep.mirror import SCRATCH_VARIABLE, object_name, shown

CURRENT = "CURRENT"
VERSION = re.compile(r"version-\d+")
UNUSED_S = 24 * 3600  # after which a node forgets its copy of a version that has a newer one


def send(directory: Path, *patterns: str) -> None:
    """Uploads files of a directory.

    Args:
        directory: maybe a mirror.
        patterns: globs below it; what is not there is passed over.
    """
    if (name := object_name(directory)) is not None:
        found = dict.fromkeys(path for pattern in patterns for path in directory.glob(pattern) if path.is_file())
        objects.upload_all((path, f"{name}/{path.relative_to(directory).as_posix()}") for path in found)


def receive(directory: Path, *patterns: str) -> None:
    """Downloads what the directory has elsewhere and not, or with another size, here.

    Args:
        directory: maybe a mirror.
        patterns: of names below it; `*` crosses slashes.
    """
    if (name := object_name(directory)) is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    missing = []
    for relative, info in objects.list_objects(name).items():
        path = contained_path(directory, relative)
        wanted = any(fnmatch(relative, pattern) for pattern in patterns)
        if wanted and not (path.is_file() and path.stat().st_size == info.size):
            missing.append((f"{name}/{relative}", path))
    objects.download_all(missing)


_refreshed: dict[Path, float] = {}


def refresh(path: Path, max_age_s: float = 0.0) -> None:
    """Makes a small file what its object is, gone where that is gone.

    Args:
        path: maybe in a mirror.
        max_age_s: what this process has seen no longer ago is new enough.
    """
    now = time.monotonic()
    if (name := object_name(path)) is None or now - _refreshed.get(path, -max_age_s - 1) < max_age_s:
        return
    try:
        objects.download(name, path)
    except FileNotFoundError:
        path.unlink(missing_ok=True)
    _refreshed[path] = now


def remove(path: Path) -> None:
    """Removes a file or a directory, here and in the store. A kill in between leaves no half of what was committed."""
    if (name := object_name(path)) is not None:
        files = [f"{name}/{relative}" for relative in objects.list_objects(name)] or [name]
        objects.delete_objects(file for file in files if file.endswith(f"/{MANIFEST_NAME}"))
        objects.delete_objects(file for file in files if not file.endswith(f"/{MANIFEST_NAME}"))
    if path.is_dir():
        removed = path.with_name(f".removed-{path.name}")
        shutil.rmtree(removed, ignore_errors=True)
        path.rename(removed)
        shutil.rmtree(removed)
    else:
        path.unlink(missing_ok=True)


def rename(path: Path, target: Path) -> None:
    """Renames a directory that nobody else uses."""
    if (name := object_name(path)) is not None:
        for relative in objects.list_objects(name):
            objects.copy_object(f"{name}/{relative}", f"{object_name(target)}/{relative}")
        if not path.exists():
            path.mkdir(parents=True)
        path.rename(target)
        remove(path)
    else:
        path.rename(target)


def directories(parent: Path, pattern: str) -> dict[Path, bool]:
    """Directories below one, sorted; with each, whether it is committed."""
    if (name := object_name(parent)) is None:
        return {path: (path / MANIFEST_NAME).is_file() for path in sorted(parent.glob(pattern)) if path.is_dir()}
    files = objects.list_objects(name)
    found = sorted({relative.partition("/")[0] for relative in files if "/" in relative})
    return {parent / child: f"{child}/{MANIFEST_NAME}" in files for child in found if fnmatch(child, pattern)}


def manifest_of(directory: Path) -> Manifest:
    """The manifest of a committed directory, read where it is; the directory is not fetched.

    Raises:
        IncompleteTableError: there is none, or it is damaged.
    """
    if (name := object_name(directory)) is None or (directory / MANIFEST_NAME).is_file():
        return read_manifest(directory)
    try:
        return parse_manifest(objects.read_object(f"{name}/{MANIFEST_NAME}"), shown(directory))
    except FileNotFoundError as error:
        raise IncompleteTableError(
            f"{shown(directory)} holds no {MANIFEST_NAME}: run (or rerun) the stage that writes this table"
        ) from error


def fetch(directory: Path) -> Path:
    """Makes sure that this node has a committed directory, with every byte verified. Returns the directory.

    What is here already is not fetched again, and an interrupted fetch goes on.

    Raises:
        IncompleteTableError: it is not committed, a file of it is missing, or one differs from its checksum.
        ObjectStoreError: the store was not reached, or refused.
    """
    if (name := object_name(directory)) is None:
        return directory
    manifest_path = directory / MANIFEST_NAME
    directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f"lock-{directory.name}")):
        if not manifest_path.is_file():
            manifest = manifest_of(directory)
            missing = [entry for entry in manifest.files if not _is_sound(directory, entry)]
            _check_room(directory, missing)
            try:
                objects.download_all(
                    (f"{name}/{entry.path}", contained_path(directory, entry.path)) for entry in missing
                )
            except FileNotFoundError as error:
                raise IncompleteTableError(
                    f"{error}, although the manifest of {shown(directory)} lists it: build the table again"
                ) from error
            for entry in missing:
                if not _is_sound(directory, entry):
                    raise IncompleteTableError(
                        f"{shown(directory)}/{entry.path} differs from the checksum in its manifest: build the table "
                        "again"
                    )
            objects.download(f"{name}/{MANIFEST_NAME}", manifest_path)
        os.utime(manifest_path)
    return directory


def push(directory: Path, before_commit: Callable[[], None] = lambda: None) -> None:
    """Uploads a committed directory: what the store does not have of it, and its manifest last.

    Args:
        directory: maybe a mirror.
        before_commit: called when all but the manifest is there.
    """
    if (name := object_name(directory)) is None:
        return
    there = objects.list_objects(name)
    missing = [
        (contained_path(directory, entry.path), f"{name}/{entry.path}")
        for entry in read_manifest(directory).files
        if entry.path not in there or there[entry.path].size != entry.size_bytes
    ]
    objects.upload_all(missing)
    before_commit()
    objects.upload(directory / MANIFEST_NAME, f"{name}/{MANIFEST_NAME}")


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


def check(directory: Path) -> None:
    """Writes, reads and deletes an object, so that storage which cannot be used is known before it is needed.

    Raises:
        ObjectStoreError: says what does not work.
    """
    if (name := object_name(directory)) is not None:
        probe = f"{name}/.check-{time.time_ns()}-{os.getpid()}"
        objects.write_object(probe, b"userrep")
        objects.read_object(probe)
        objects.delete_objects([probe])


def _remove_versions(table: Path, kept: set[Path]) -> None:
    local = {path for path in table.glob("version-*") if path.is_dir()}
    for path in {*directories(table, "version-*"), *local} - kept:
        remove(path)


def _forget_unused(version: Path) -> None:
    """Removes this node's copies of versions that have long been superseded; they cost disk and nothing else."""
    for path in version.parent.glob(f"version-*/{MANIFEST_NAME}"):
        if path.parent != version and path.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(path.parent)


def _is_sound(directory: Path, entry: FileEntry) -> bool:
    path = contained_path(directory, entry.path)
    return path.is_file() and path.stat().st_size == entry.size_bytes and sha256_file(path) == entry.sha256


def _check_room(directory: Path, missing: list[FileEntry]) -> None:
    free, needed = shutil.disk_usage(directory.parent).free, sum(entry.size_bytes for entry in missing)
    if needed > free:
        raise ConfigError(
            f"{directory.parent} has {free / 2**20:,.0f} MiB free, and a copy of {shown(directory)} takes "
            f"{needed / 2**20:,.0f}: free some space, or set {SCRATCH_VARIABLE} on all nodes"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
