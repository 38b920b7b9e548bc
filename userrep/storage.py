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
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

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
)
from userrep.mirror import SCRATCH_VARIABLE, mirror_in, object_name, scratch_of, shown


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
    """Downloads what the directory has elsewhere and not, or with another size, here; times are those of the objects.

    Args:
        directory: maybe a mirror.
        patterns: of names below it; `*` crosses slashes.
    """
    if (name := object_name(directory)) is None:
        return
    directory.mkdir(parents=True, exist_ok=True)
    missing, times = [], dict[Path, int]()
    for relative, info in objects.list_objects(name).items():
        path = contained_path(directory, relative)
        wanted = any(fnmatch(relative, pattern) for pattern in patterns)
        if wanted and not (path.is_file() and path.stat().st_size == info.size):
            missing.append((f"{name}/{relative}", path))
            times[path] = info.mtime_ns or 0
    objects.download_all(missing)
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))


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
        files = [f"{name}/{relative}" for relative in objects.list_objects(name)]
        objects.delete_objects(file for file in files if file.endswith(f"/{MANIFEST_NAME}"))
        if files:
            objects.delete_prefix(name)
        else:
            objects.delete_objects([name])
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


def remove_uncommitted(parent: Path, pattern: str) -> None:
    """Removes from the store what interrupted uploads have left, and from this node what is not in the store."""
    if object_name(parent) is not None:
        found = directories(parent, pattern)
        for path in {*(path for path in parent.glob(pattern) if path.is_dir()), *found}:
            if not found.get(path, False):
                remove(path)


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


@contextmanager
def private(directory: Path) -> Iterator[Path]:
    """A mirror of the same place that no other process writes to, for the block; what is no mirror is given as it is.

    It begins empty. That of a process that was killed is removed by the next one that asks on this node.
    """
    if (name := object_name(directory)) is None:
        yield directory
        return
    root = scratch_of(directory)
    for other in root.glob("private-*/lock"):
        with suppress(OSError), other.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other.parent)
    made = root / f".new-{uuid4().hex}"
    made.mkdir(parents=True)
    with (made / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = made.rename(root / f"private-{made.name[5:]}")
        try:
            (own_directory := mirror_in(own, name)).mkdir(parents=True)
            yield own_directory
        finally:
            shutil.rmtree(own, ignore_errors=True)


def for_ray(path: Path) -> dict[str, Any]:
    """Where Ray Train is to keep what it insists on writing, as arguments of its `RunConfig`."""
    if (name := object_name(path)) is None:
        return {"storage_path": str(path)}
    return {"storage_path": name, "storage_filesystem": objects.filesystem(name.partition("/")[0])}


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
