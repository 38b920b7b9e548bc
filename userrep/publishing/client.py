"""Finds, pulls and verifies published tables. Needs neither torch nor ray, numpy or pandas.

What works on a bare install (pyarrow + mlflow-skinny) is in `userrep.publishing.connection`.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow.dataset as pads

from userrep.manifest import (
    MANIFEST_NAME,
    IncompleteTableError,
    Manifest,
    move_into_place,
    sha256_file,
    verify_files,
)
from userrep.publishing.connection import TRANSFER_LIMITS, connect, redacted
from userrep.publishing.entity import ENTITIES, Entity
from userrep.publishing.kind import TableKind
from userrep.publishing.table import read_table
from userrep.publishing.transfer import (
    Progress,
    TransferError,
    download,
    published_manifest,
    sole_pull,
    staging_directory,
)
from userrep.publishing.verify import embedding_kind, unlisted_files, verify_parts
from userrep.publishing.versions import TableSummary, TableVersion, list_tables, resolve

__all__ = [
    "PulledTable",
    "TableMismatchError",
    "TableSummary",
    "TableVersion",
    "TransferError",
    "list_tables",
    "pull",
    "resolve",
]


class TableMismatchError(IncompleteTableError):
    """What was downloaded, or what lies at the destination, is not the published table."""


@dataclass(frozen=True)
class Pulled:
    """A verified local copy of a table of any kind."""

    directory: Path
    manifest: Manifest
    version: TableVersion


class PulledTable(Pulled):
    """A verified local copy of an embedding table."""

    @property
    def entity(self) -> Entity:
        """What its rows stand for: users or items."""
        return ENTITIES[self.manifest.table]

    def dataset(self) -> pads.Dataset:
        """Opens the copy as an Arrow dataset, without hashing it again."""
        return read_table(self.directory, verify=False)


def pull(
    reference: str,
    to: Path,
    *,
    tracking_uri: str,
    aligned_to: str | None = None,
    on_progress: Progress | None = None,
    verbose: bool = False,
) -> PulledTable:
    """Downloads a published table, of users or of items, verifies all of it, and moves it to `to` in one step.

    A verified copy of the same version at `to` is returned without a download. Another table at `to` is replaced after
    the new one is complete. On any error, `to` is as it was before. What an interrupted pull has fetched is kept beside
    `to`, and the next pull of that version fetches the rest. A second pull to `to` waits for the first.

    Args:
        reference: `name@alias`, `name@v12` or `name/12`.
        to: directory of the table; must not exist, be empty, or hold a pulled table and nothing else.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        aligned_to: `v12`, or an alias: the vectors are turned into the space of that version, so that what was learned
            from its vectors goes on working. Needs numpy: `pip install 'userrep[tables]'`.
        on_progress: is told the bytes that are there, and those of the table, as files arrive; not of `aligned_to`.
        verbose: let MLflow log.

    Raises:
        RegistryError: a subclass says whether the server, the name, or the version was not found.
        TableMismatchError: the files differ from what was published, or `to` holds something else.
        TransferError: a file could not be read or stored; what is there is kept.
        AlignmentError: no chain of maps leads to the space of `aligned_to`.
    """
    if aligned_to is not None:
        from userrep.publishing.aligned import pull_aligned  # numpy, which no other pull needs

        return pull_aligned(reference, to, aligned_to, tracking_uri=tracking_uri, verbose=verbose)
    version = resolve(reference, tracking_uri=tracking_uri, verbose=verbose)
    pulled = pull_version(version, to, tracking_uri=tracking_uri, on_progress=on_progress, verbose=verbose)
    return PulledTable(pulled.directory, pulled.manifest, pulled.version)


def pull_version(
    version: TableVersion,
    to: Path,
    *,
    tracking_uri: str,
    kind: TableKind | None = None,
    on_progress: Progress | None = None,
    verbose: bool = False,
) -> Pulled:
    """As `pull`, of a version that `resolve` has found, of any kind of table; None as in `resolve`."""
    to = Path(to).absolute()
    with sole_pull(to):
        if (manifest := _present(to, version, kind)) is not None:
            return Pulled(to, manifest, version)
        what = f"{version.name} version {version.version} from {redacted(tracking_uri)}"
        try:
            staging = staging_directory(to, version)
            try:
                with connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose):
                    manifest = download(version, staging, tracking_uri, kind, on_progress)
                move_into_place(staging, to)
            except IncompleteTableError as error:
                shutil.rmtree(staging)
                raise TableMismatchError(f"{what} is not what was published, nothing was kept: {error}") from error
        except OSError as error:
            raise TransferError(f"{what} could not be stored at {to}: {error}") from error
        return Pulled(to, manifest, version)


def held_table(to: Path, kind: TableKind | None = None) -> Manifest | None:
    """The manifest of the table at `to`, unverified; None where there is nothing, so that a pull may go there.

    Raises:
        TableMismatchError: `to` holds what a pull must not replace.
    """
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return None
    try:
        manifest = (kind or embedding_kind(to)).read(to)
        strays = unlisted_files(to, manifest)
    except (IncompleteTableError, OSError) as error:
        raise TableMismatchError(f"{to} exists and is no pulled table ({error}); pull to another directory") from error
    if strays:
        raise TableMismatchError(f"{to} also holds {strays[0]!r}, which a pull would delete; pull to another directory")
    return manifest


def _present(to: Path, version: TableVersion, kind: TableKind | None) -> Manifest | None:
    """The manifest of a sound copy of this version at `to`; refuses a destination that holds anything but a table."""
    if held_table(to, kind) is None or sha256_file(to / MANIFEST_NAME) != version.manifest_sha256:
        return None
    try:
        return (kind or embedding_kind(to)).verify(to)
    except IncompleteTableError:
        return None  # a damaged copy of the right version: fetch it again


@contextmanager
def opened(
    version: TableVersion, *, tracking_uri: str, scratch: Path | None = None, verbose: bool = False
) -> Iterator[Path]:
    """Gives a directory with the verified table of a version while the block runs.

    Files that lie on this machine are read where they are; others are pulled and deleted again.

    Args:
        version: of an embedding table, from `resolve`.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        scratch: where files are pulled to; by default the system's directory for temporary files.
        verbose: let MLflow log.

    Raises:
        TableMismatchError: the files differ from what was published.
    """
    parts = urlsplit(version.location)
    if parts.scheme in ("", "file"):
        directory = Path(unquote(parts.path))
        try:
            manifest, _ = published_manifest(directory, version, None)
            verify_files(directory, manifest)
            verify_parts(directory, manifest)
        except (IncompleteTableError, OSError) as error:
            raise TableMismatchError(
                f"{version.name} version {version.version} is not what was published: {error}"
            ) from error
        yield directory
        return
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        yield pull_version(version, Path(folder) / "table", tracking_uri=tracking_uri, verbose=verbose).directory
