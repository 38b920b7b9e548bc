"""What makes a directory an embedding table: manifest, sizes, sha256, schema, row counts, nothing unlisted.

Used by every writer and every reader of one. What a row must be is in `rows.py`.
Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from userrep.publishing.entity import ENTITIES, Entity
from userrep.publishing.kind import TableKind
from userrep.publishing.rows import EmbeddingTableError, columns_text

PART_NAME = re.compile(r"part-\d{5,}\.parquet")
GIVEN_FACTS = ("encoder_digest", "tokenizer_digest", "data_digest", "code_version")
DERIVED_FACTS = ("rows", "dim", "dtype", "metric", "table_sha256", "config_hash")
TASKS_FACT = "tasks"  # names of the tasks that have a column, in that order; absent where there are none
BUCKETING_FACT = "bucketing"  # rule by which ids are dealt to parts, and how many; absent where that is unknown
BUCKET_RULE = "crc32 of the utf-8 id modulo count"
QUANTISATION_FACT = "quantisation"  # what int8 cost; absent for other types
OPTIONAL_FACTS = (QUANTISATION_FACT, "id_space_digest")  # that `finish_table` derives where it can


def bucket_of(entity_id: str, num_buckets: int) -> int:
    """Bucket (0-based) of a user or an item: CRC-32 of the UTF-8 id modulo `num_buckets`; the same on every machine."""
    return zlib.crc32(entity_id.encode()) % num_buckets


def verify_table(directory: Path, entity: Entity | None = None) -> Manifest:
    """Checks a committed table completely: manifest, every checksum, schema, row counts, no unlisted file.

    Args:
        directory: holds `manifest.json`.
        entity: what a row must stand for; None allows any.

    Raises:
        IncompleteTableError: names the first thing that is missing or differs.
    """
    manifest = table_manifest(directory, entity)
    verify_files(directory, manifest)
    verify_parts(directory, manifest)
    if extra := unlisted_files(directory, manifest):
        raise IncompleteTableError(f"{directory} holds {extra[0]!r}, which its manifest does not list; remove it")
    return manifest


def table_manifest(directory: Path, entity: Entity | None = None) -> Manifest:
    """Reads the manifest and checks that it describes an embedding table, without touching the other files.

    Args:
        directory: holds `manifest.json`.
        entity: what a row must stand for; None allows any.

    Raises:
        IncompleteTableError: no manifest, another kind of table, a file outside the directory, or facts that
            contradict the listed files.
    """
    manifest = read_manifest(directory)
    allowed = tuple(ENTITIES) if entity is None else (entity.table,)
    if manifest.table not in allowed:
        wanted = " or ".join(map(repr, allowed))
        raise IncompleteTableError(f"{directory} holds a table of kind {manifest.table!r}, wanted {wanted}")
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
    """Checks schema, row count and range of ids in the footer of every part; reads no rows.

    Raises:
        IncompleteTableError: names the part.
    """
    schema = schema_of(manifest)
    for entry in part_entries(manifest):
        path = contained_path(directory, entry.path)
        try:
            with pq.ParquetFile(path) as part:
                rows, found, bounds = part.metadata.num_rows, part.schema_arrow, _id_bounds(part.metadata)
        except (OSError, pa.ArrowInvalid) as error:
            raise IncompleteTableError(f"{path} is not a readable Parquet file: {error}") from error
        if rows != entry.rows:
            raise IncompleteTableError(f"{path} holds {rows} rows, its manifest says {entry.rows}")
        if not found.equals(schema):
            raise IncompleteTableError(
                f"{path} has the columns {columns_text(found)}, its manifest promises {columns_text(schema)}"
            )
        if entry.min_id is not None and bounds not in (None, stated := (entry.min_id, entry.max_id)):
            raise IncompleteTableError(f"{path} has ids from {bounds}, its manifest says from {stated}")


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
    """Schema that the kind of the table and the facts `dim`, `dtype` and `tasks` promise.

    Raises:
        IncompleteTableError: the facts name no possible schema.
    """
    dim, dtype, tasks = manifest.facts["dim"], manifest.facts["dtype"], manifest.facts.get(TASKS_FACT, [])
    try:
        return ENTITIES[manifest.table].schema(dim, dtype, tasks)
    except (ValueError, TypeError) as error:
        raise IncompleteTableError(
            f"manifest states dim {dim!r}, dtype {dtype!r} and tasks {tasks!r}: {error}"
        ) from error


def check_ids_unique(directory: Path, manifest: Manifest) -> None:
    """Checks that no id is in two parts. Holds the table's ids in memory, not its vectors.

    Raises:
        EmbeddingTableError: names an id and how many rows there are too many.
    """
    entity = ENTITIES[manifest.table]
    paths = [contained_path(directory, entry.path) for entry in part_entries(manifest)]
    if not paths:
        return
    columns = [pq.read_table(path, columns=[entity.id_column])[entity.id_column] for path in paths]
    ids = pa.chunked_array([chunk for column in columns for chunk in column.chunks], pa.string())
    if surplus := len(ids) - pc.count_distinct(ids).as_py():
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise EmbeddingTableError(
            f"{surplus} rows too many: {entity.name} {twice!r} is in more than one part; bucket by {entity.name} id"
        )


def bucketing_facts(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """How ids are dealt to the parts: as the facts say, else by `bucket_of` if that holds for every id.

    Raises:
        EmbeddingTableError: the facts say that there are more or fewer parts than there are.
    """
    parts, column = part_entries(manifest), ENTITIES[manifest.table].id_column
    is_complete = [entry.path for entry in parts] == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    if (stated := manifest.facts.get(BUCKETING_FACT)) is not None:
        if not is_complete or not isinstance(stated, dict) or stated.get("count") != len(parts):
            raise EmbeddingTableError(
                f"facts[{BUCKETING_FACT!r}] is {stated!r}, the table has {len(parts)} parts: give rule and count"
            )
        return {BUCKETING_FACT: stated}
    if not is_complete:
        return {}
    for number, entry in enumerate(parts):
        ids = pq.read_table(contained_path(directory, entry.path), columns=[column])[column]
        if any(bucket_of(one, len(parts)) != number for one in ids.to_pylist()):
            return {}
    return {BUCKETING_FACT: {"rule": BUCKET_RULE, "count": len(parts)}} if parts else {}


def _id_bounds(metadata: pq.FileMetaData) -> tuple[str, str] | None:
    """First and last id as the footer states them; None where it does not, as for ids of kilobytes."""
    groups = [metadata.row_group(number).column(0).statistics for number in range(metadata.num_row_groups)]
    if not groups or any(found is None or not found.has_min_max for found in groups):
        return None
    return min(found.min for found in groups), max(found.max for found in groups)


def embedding_kind(directory: Path) -> TableKind:
    """Kind of the embedding table that a directory holds, as its manifest states.

    Raises:
        IncompleteTableError: as `table_manifest`.
    """
    return EMBEDDING_KINDS[table_manifest(directory).table]


def _kind(entity: Entity) -> TableKind:
    return TableKind(
        name=entity.table,
        noun="embedding table",
        rows_are=f"{entity.name}s",
        publisher="userrep publish",
        model_type="embedding-table",
        identity="table_sha256",
        params=("rows", "dim", "dtype", "metric", *GIVEN_FACTS, "config_hash"),
        tags=("rows", "dim", "dtype", TASKS_FACT),
        read=partial(table_manifest, entity=entity),
        verify=partial(verify_table, entity=entity),
        describe=lambda facts: (
            f"{facts['rows']:,} {entity.name}s x {facts['dim']} {facts['dtype']}; see card.md among the files"
        ),
    )


EMBEDDING_KINDS: Mapping[str, TableKind] = {entity.table: _kind(entity) for entity in ENTITIES.values()}
