"""What makes a directory a user embedding table: manifest, sizes, sha256, schema, row counts, nothing unlisted.

Used by every writer and every reader of one. What a row must be is in `rows.py`.
Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.manifest import (
    MANIFEST_NAME,
    FileEntry,
    IncompleteTableError,
    Manifest,
    contained_path,
    read_manifest,
    verify_files,
)
from userrep.publishing.kind import TableKind
from userrep.publishing.rows import EmbeddingTableError, columns_text
from userrep.schema import user_embeddings

TABLE_KIND = "user_embeddings"
PART_NAME = re.compile(r"part-\d{5,}\.parquet")
GIVEN_FACTS = ("encoder_digest", "tokenizer_digest", "data_digest", "code_version")
DERIVED_FACTS = ("rows", "dim", "dtype", "metric", "table_sha256", "config_hash")
TASKS_FACT = "tasks"  # names of the tasks that have a column, in that order; absent where there are none


def verify_table(directory: Path) -> Manifest:
    """Checks a committed table completely: manifest, every checksum, schema, row counts, no unlisted file.

    Raises:
        IncompleteTableError: names the first thing that is missing or differs.
    """
    manifest = table_manifest(directory)
    verify_files(directory, manifest)
    verify_parts(directory, manifest)
    if extra := unlisted_files(directory, manifest):
        raise IncompleteTableError(f"{directory} holds {extra[0]!r}, which its manifest does not list; remove it")
    return manifest


def table_manifest(directory: Path) -> Manifest:
    """Reads the manifest and checks that it describes a user embedding table, without touching the other files.

    Raises:
        IncompleteTableError: no manifest, another kind of table, a file outside the directory, or facts that
            contradict the listed files.
    """
    manifest = read_manifest(directory)
    if manifest.table != TABLE_KIND:
        raise IncompleteTableError(f"{directory} holds a table of kind {manifest.table!r}, wanted {TABLE_KIND!r}")
    facts = manifest.facts
    if lacking := [key for key in (*DERIVED_FACTS, *GIVEN_FACTS) if key not in facts]:
        raise IncompleteTableError(
            f"manifest of {directory} lacks the facts {', '.join(lacking)}; write the table again"
        )
    for entry in manifest.files:
        contained_path(directory, entry.path)
    parts = part_entries(manifest)
    if facts["table_sha256"] != (actual := content_sha256(parts)):
        raise IncompleteTableError(
            f"manifest of {directory} states table_sha256 {facts['table_sha256']}, its parts give {actual}"
        )
    if facts["rows"] != (rows := sum(entry.rows or 0 for entry in parts)):
        raise IncompleteTableError(f"manifest of {directory} states {facts['rows']} rows, its parts {rows}")
    return manifest


def verify_parts(directory: Path, manifest: Manifest) -> None:
    """Checks schema and row count in the footer of every part; reads no rows.

    Raises:
        IncompleteTableError: names the part.
    """
    schema = schema_of(manifest)
    for entry in part_entries(manifest):
        path = contained_path(directory, entry.path)
        try:
            with pq.ParquetFile(path) as part:
                rows, found = part.metadata.num_rows, part.schema_arrow
        except (OSError, pa.ArrowInvalid) as error:
            raise IncompleteTableError(f"{path} is not a readable Parquet file: {error}") from error
        if rows != entry.rows:
            raise IncompleteTableError(f"{path} holds {rows} rows, its manifest says {entry.rows}")
        if not found.equals(schema):
            raise IncompleteTableError(
                f"{path} has the columns {columns_text(found)}, its manifest promises {columns_text(schema)}"
            )


def unlisted_files(directory: Path, manifest: Manifest) -> list[str]:
    """Relative paths of files that neither the manifest lists nor the manifest is, sorted."""
    listed = {entry.path for entry in manifest.files} | {MANIFEST_NAME}
    present = (path.relative_to(directory).as_posix() for path in Path(directory).rglob("*") if not path.is_dir())
    return sorted(path for path in present if path not in listed)


def part_entries(manifest: Manifest) -> tuple[FileEntry, ...]:
    """The Parquet parts among a table's files."""
    return tuple(entry for entry in manifest.files if PART_NAME.fullmatch(entry.path))


def content_sha256(parts: Sequence[FileEntry]) -> str:
    """Identity of a table's rows: hex sha256 over the sorted sha256 of its parts, one per line."""
    return hashlib.sha256("\n".join(sorted(entry.sha256 for entry in parts)).encode()).hexdigest()


def schema_of(manifest: Manifest) -> pa.Schema:
    """Schema that the facts `dim`, `dtype` and `tasks` promise.

    Raises:
        IncompleteTableError: the facts name no possible schema.
    """
    dim, dtype, tasks = manifest.facts["dim"], manifest.facts["dtype"], manifest.facts.get(TASKS_FACT, [])
    try:
        return user_embeddings(dim, dtype, tasks)
    except (ValueError, TypeError) as error:
        raise IncompleteTableError(
            f"manifest states dim {dim!r}, dtype {dtype!r} and tasks {tasks!r}: {error}"
        ) from error


def check_users_unique(directory: Path, manifest: Manifest) -> None:
    """Checks that no user is in two parts. Holds the table's user ids in memory, not its vectors.

    Raises:
        EmbeddingTableError: names a user and how many rows there are too many.
    """
    paths = [contained_path(directory, entry.path) for entry in part_entries(manifest)]
    if not paths:
        return
    ids = pa.concat_tables([pq.read_table(path, columns=["user_id"]) for path in paths])
    if surplus := ids.num_rows - pc.count_distinct(ids["user_id"]).as_py():
        counts = pc.value_counts(ids["user_id"])
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise EmbeddingTableError(
            f"{surplus} rows too many: user {twice!r} is in more than one part; bucket by user id"
        )


EMBEDDINGS = TableKind(
    name=TABLE_KIND,
    noun="embedding table",
    publisher="userrep publish",
    model_type="embedding-table",
    identity="table_sha256",
    params=("rows", "dim", "dtype", "metric", *GIVEN_FACTS, "config_hash"),
    tags=("rows", "dim", "dtype", TASKS_FACT),
    read=table_manifest,
    verify=verify_table,
    describe=lambda facts: f"{facts['rows']:,} users x {facts['dim']} {facts['dtype']}; see card.md among the files",
)
