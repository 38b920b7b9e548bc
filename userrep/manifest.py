"""The commit record of a table directory: a directory without `manifest.json` does not exist for the next stage."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from userrep.config import Config, digest_json
from userrep.schema import SCHEMA_VERSION

MANIFEST_NAME = "manifest.json"
HASH_CHUNK_BYTES = 1 << 20
ERASED_FROM_FACT = "erased_from"  # digest of the manifest before the first erasure of users from the table


class IncompleteTableError(ValueError):
    """The directory holds no committed table, or its content differs from its manifest."""


class QuantisationError(Config):
    """What int8 has cost the vectors that were rounded to it, measured when they were."""

    vectors: int  # that were measured
    mean_cosine: float  # of a vector and what is read back
    min_cosine: float
    max_abs_error: float  # of one value


class FileEntry(Config):
    """One file of a table."""

    path: str  # relative to the manifest, with forward slashes
    size_bytes: int
    sha256: str
    rows: int | None = None
    min_id: str | None = None  # of a part that is sorted by id
    max_id: str | None = None
    quantisation: QuantisationError | None = None  # of a part of int8

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leaves out what most files do not have, so that digests of their manifests stay as they were."""
        values = handler(self)
        return {key: value for key, value in values.items() if value is not None or key == "rows"}


class Manifest(Config):
    """What a table directory holds and what it was made from."""

    schema_version: int = SCHEMA_VERSION
    table: str  # shards_text, shards, encoder, baselines, user_embeddings, ...
    stage: str  # the stage that wrote it
    config: dict[str, Any]  # resolved config of that stage
    inputs: dict[str, str] = Field(default_factory=dict)  # input table -> digest of its manifest
    files: tuple[FileEntry, ...] = ()
    facts: dict[str, Any] = Field(default_factory=dict)  # table-specific, JSON-plain

    def digest(self) -> str:
        """Hex digest (12 characters) of everything that the manifest states, file hashes included."""
        return digest_json(self.model_dump(mode="json"))

    def lineage(self) -> str:
        """Digest by which the tables that were made from this one name it: that of the table as it was committed.

        Erasing users from it changes its files, but does not put what was made from it out of date.
        """
        return self.facts.get(ERASED_FROM_FACT) or self.digest()


def read_manifest(directory: Path) -> Manifest:
    """Reads the manifest of a committed table.

    Raises:
        IncompleteTableError: there is none (the writing stage was interrupted or never ran), or it is not readable.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.is_file():
        raise IncompleteTableError(
            f"{directory} holds no {MANIFEST_NAME}: run (or rerun) the stage that writes this table"
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, origin: str) -> Manifest:
    """Reads what a manifest holds.

    Args:
        content: of the file.
        origin: where it lies, for the message.

    Raises:
        IncompleteTableError: it is not readable.
    """
    try:
        manifest = Manifest.parse(json.loads(content))
    except (ValueError, RecursionError) as error:  # also of text that is no JSON, and of numbers of 5,000 digits
        raise IncompleteTableError(
            f"{origin} is damaged ({error}); delete the directory and rerun its stage"
        ) from error
    if manifest.schema_version != SCHEMA_VERSION:
        raise IncompleteTableError(
            f"{origin} has schema version {manifest.schema_version}, this code reads {SCHEMA_VERSION}: rerun its stage"
        )
    paths = [entry.path for entry in manifest.files]
    if len(set(paths)) < len(paths):
        twice = next(one for one in paths if paths.count(one) > 1)
        raise IncompleteTableError(f"{origin} lists {twice!r} twice; delete the directory and rerun its stage")
    return manifest


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Checks that every file of the manifest is there, with its size and sha256.

    Raises:
        IncompleteTableError: names the first file that is missing or differs.
    """
    for entry in manifest.files:
        path = contained_path(directory, entry.path)
        if not path.is_file():
            raise IncompleteTableError(
                f"{path} is missing although its manifest lists it; fetch or build the table again"
            )
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise IncompleteTableError(f"{path} has {size_bytes} bytes, its manifest says {entry.size_bytes}")
        if (actual := sha256_file(path)) != entry.sha256:
            raise IncompleteTableError(f"{path} has sha256 {actual}, its manifest says {entry.sha256}")


def contained_path(directory: Path, relative: str) -> Path:
    """Joins a manifest path to its directory, refusing any that would leave it."""
    path = Path(os.path.normpath(Path(directory) / relative))
    if not relative.isprintable():
        raise IncompleteTableError(f"manifest of {directory} names {relative!r}, which is no name of a file")
    if Path(relative).is_absolute() or Path(os.path.normpath(directory)) not in path.parents:
        raise IncompleteTableError(f"manifest of {directory} names {relative!r}, which lies outside the directory")
    return path


def describe_file(directory: Path, path: Path, rows: int | None = None) -> FileEntry:
    """Measures a finished file for its manifest entry."""
    relative = path.relative_to(directory).as_posix()
    return FileEntry(path=relative, size_bytes=path.stat().st_size, sha256=sha256_file(path), rows=rows)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader sees either the old file or the complete new one, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=1, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Commits a table in place: the manifest is the last file to appear."""
    write_json(Path(directory) / MANIFEST_NAME, manifest.model_dump(mode="json"))


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """Gives an empty directory beside `final` and moves it into place when the block ends without an error.

    What an interrupted run left behind is removed first. The previous content of `final`, if any, is replaced only
    after the new directory is complete; without a manifest in it, nothing is moved.
    """
    final = Path(final)
    staging = final.with_name(f".{final.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    yield staging
    move_into_place(staging, final)


def move_into_place(staging: Path, final: Path) -> None:
    """Moves a complete directory to `final` on the same file system; what was there is replaced.

    Raises:
        IncompleteTableError: it has no manifest; nothing was moved.
    """
    if not (staging / MANIFEST_NAME).is_file():
        raise IncompleteTableError(f"nothing was committed to {staging}: a stage must write its manifest last")
    superseded = superseded_directory(final)
    shutil.rmtree(superseded, ignore_errors=True)
    if final.exists():
        os.replace(final, superseded)
    os.replace(staging, final)
    shutil.rmtree(superseded, ignore_errors=True)


def superseded_directory(final: Path) -> Path:
    """Where what was at `final` is while it is being replaced."""
    return final.with_name(f".{final.name}.superseded")
