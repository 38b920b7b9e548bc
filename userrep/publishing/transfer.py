"""Files of a version from the registry to a directory: resumable, in parallel, one pull at a time per destination.

Beside a destination `users` a pull keeps `.users.<digest>.pulling`, where the digest is that of the version's manifest.
An interrupted pull leaves it there, and the next one of the same version fetches only what it lacks.
"""

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import requests
from mlflow.artifacts import download_artifacts
from mlflow.exceptions import MlflowException

from userrep.manifest import (
    MANIFEST_NAME,
    FileEntry,
    IncompleteTableError,
    Manifest,
    contained_path,
    sha256_file,
    superseded_directory,
)
from userrep.publishing.connection import redacted
from userrep.publishing.kind import TableKind
from userrep.publishing.verify import embedding_kind, unlisted_files
from userrep.publishing.versions import TableVersion

DOWNLOADS_AT_ONCE = 4
DIGEST_CHARS = 12  # of the manifest's sha256, in the name of a staging directory

Progress = Callable[[int, int], None]  # bytes that are there, bytes of all files


class TransferError(ValueError):
    """A file could not be read or written on the way; what had arrived before is kept for the next pull."""


@contextmanager
def sole_pull(to: Path) -> Iterator[None]:
    """Waits until no other pull of this machine writes to `to`; the block then has it for itself.

    A table that a killed pull had moved aside, and not yet replaced, is put back first.

    Raises:
        TransferError: its parent cannot be written.
    """
    path = to.with_name(f".{to.name}.lock")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
    except OSError as error:
        raise TransferError(f"cannot write beside {to}: {error}; pull to another directory") from error
    try:
        superseded = superseded_directory(to)
        if superseded.exists() and not to.exists():
            os.replace(superseded, to)
        yield
    finally:
        path.unlink()  # by its holder only, so that a lock file is never another one than that which is waited for
        os.close(lock)


def staging_directory(to: Path, version: TableVersion) -> Path:
    """Where a pull of this version to `to` gathers its files; removes what pulls of other versions have left."""
    mine = to.with_name(f".{to.name}.{version.manifest_sha256[:DIGEST_CHARS]}.pulling")
    stale = re.compile(rf"\.{re.escape(to.name)}\.[0-9a-f]{{{DIGEST_CHARS}}}\.pulling")
    for path in to.parent.iterdir():
        if path != mine and stale.fullmatch(path.name):
            shutil.rmtree(path)
    mine.mkdir(exist_ok=True)
    return mine


def download(
    version: TableVersion, staging: Path, tracking_uri: str, kind: TableKind | None, on_progress: Progress | None = None
) -> Manifest:
    """Brings a directory to what was published, and verifies all of it; inside a `connect` block.

    Files that are there already with the right sha256 stay; others are fetched.

    Args:
        version: from `resolve`.
        staging: from `staging_directory`.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        kind: of the table; None for an embedding table.
        on_progress: is told as files arrive.

    Raises:
        IncompleteTableError: what arrived is not what was published.
        TransferError: a file could not be stored.
    """
    fetch_file(version, MANIFEST_NAME, staging, tracking_uri=tracking_uri)
    manifest, kind = published_manifest(staging, version, kind)
    for stray in unlisted_files(staging, manifest):  # halves of a killed download
        (staging / stray).unlink()
    done, total = 0, sum(entry.size_bytes for entry in manifest.files)
    with ThreadPoolExecutor(DOWNLOADS_AT_ONCE) as pool:
        for size in pool.map(partial(_have, version, staging, tracking_uri), manifest.files):
            done += size
            if on_progress:
                on_progress(done, total)
    return kind.verify(staging)


def fetch_file(version: TableVersion, relative: str, folder: Path, *, tracking_uri: str) -> Path:
    """Downloads one file of a version, unverified; inside a `connect` block. Returns where it is.

    Args:
        version: from `resolve`.
        relative: path among the files of the version.
        folder: in which the same relative path appears.
        tracking_uri: address of the MLflow server, or an absolute database URI.

    Raises:
        IncompleteTableError: the version has no such file, or the path would leave the folder.
        TransferError: it could not be read, or not be stored.
    """
    target = contained_path(folder, relative)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        download_artifacts(
            artifact_uri=f"{version.location}/{relative}", dst_path=str(target.parent), tracking_uri=tracking_uri
        )
    except MlflowException as error:
        # The local store says so by error code, the server's proxy only in the text of an INTERNAL_ERROR.
        if "No such artifact" not in str(error):
            raise
        raise IncompleteTableError(f"{relative} is missing from {redacted(version.location)}") from error
    except ImportError as error:
        raise TransferError(
            f"{redacted(version.location)} cannot be read without {error.name}: install it, as MLflow's "
            "documentation of that storage says"
        ) from error
    except requests.exceptions.RequestException:
        raise  # an OSError too, which `connect` explains
    except OSError as error:
        raise TransferError(
            f"{relative} of {version.name} version {version.version} could not be fetched from "
            f"{redacted(version.location)} to {folder}: {error}"
        ) from error
    if not target.is_file():
        raise IncompleteTableError(f"{relative} is no file in {redacted(version.location)}")
    return target


def published_manifest(directory: Path, version: TableVersion, kind: TableKind | None) -> tuple[Manifest, TableKind]:
    """The manifest in a directory, if it is the one that was published; and the kind of its table.

    Raises:
        IncompleteTableError: it is another one.
    """
    manifest_sha256 = sha256_file(directory / MANIFEST_NAME)
    if manifest_sha256 != version.manifest_sha256:
        raise IncompleteTableError(
            f"its manifest has sha256 {manifest_sha256}, published was {version.manifest_sha256}"
        )
    kind = kind or embedding_kind(directory)
    manifest = kind.read(directory)
    if (found := manifest.facts[kind.identity]) != version.table_sha256:
        raise IncompleteTableError(f"its manifest is of table {found}, published was {version.table_sha256}")
    return manifest, kind


def _have(version: TableVersion, staging: Path, tracking_uri: str, entry: FileEntry) -> int:
    """Fetches a file unless it is there; returns its size."""
    path = contained_path(staging, entry.path)
    is_there = path.is_file() and path.stat().st_size == entry.size_bytes and sha256_file(path) == entry.sha256
    if not is_there:
        fetch_file(version, entry.path, staging, tracking_uri=tracking_uri)
    return entry.size_bytes


def _locked(path: Path) -> int:
    """File descriptor of a lock file that is held, and is the one that others find."""
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        os.close(lock)  # that of a pull which has ended and removed it meanwhile
