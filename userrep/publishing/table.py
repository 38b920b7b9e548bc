"""Embedding tables on disk, of users or of items: parts sorted by id, a card, and a manifest that is written last.

A table is a directory of `part-00007.parquet` files (one per hash bucket of ids), `card.md` and `manifest.json`.
Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from userrep.config import digest_json
from userrep.manifest import (
    FileEntry,
    IncompleteTableError,
    Manifest,
    contained_path,
    describe_file,
    verify_files,
    write_manifest,
)
from userrep.publishing.card import CARD_NAME, render_card
from userrep.publishing.entity import USER, Entity, entity_of
from userrep.publishing.id_space import ID_SPACE_FACT, id_space_facts
from userrep.publishing.inputs import inputs_entries
from userrep.publishing.quality import QUALITY_NAME
from userrep.publishing.rows import EmbeddingTableError, checked_rows, dtype_of, int8_rows, vector_columns
from userrep.publishing.vectors import joined_errors
from userrep.publishing.verify import (
    DERIVED_FACTS,
    GIVEN_FACTS,
    OPTIONAL_FACTS,
    QUANTISATION_FACT,
    TASKS_FACT,
    bucket_of,
    bucketing_facts,
    check_ids_unique,
    content_sha256,
    part_entries,
    schema_of,
    table_manifest,
    unlisted_files,
    verify_parts,
    verify_table,
)

__all__ = ["bucket_of", "finish_table", "lookup", "read_table", "write_part"]

METRIC = "cosine"
ROW_GROUP_ROWS = 16_384  # 16 MB at 256 float32: a lookup of few ids decodes little, the footer stays small


def write_part(
    directory: Path, bucket: int, table: pa.Table, entity: Entity = USER, dtype: str | None = None
) -> FileEntry:
    """Checks one bucket of rows and writes it as a Parquet part, sorted by id, in one atomic step.

    Args:
        directory: where the table is being built; must exist.
        bucket: hash bucket of these ids, >= 0; it names the part.
        table: columns of `entity.schema`, any row order, any chunking; may be empty. All parts of a table have the same
            columns of tasks.
        entity: what a row stands for.
        dtype: `int8` rounds the vectors, and the entry says what that cost; None leaves them as they are.

    Raises:
        EmbeddingTableError: other columns, nulls, duplicate ids, or a vector that is not finite or not of norm 1.
    """
    if bucket < 0:
        raise EmbeddingTableError(f"bucket {bucket} is negative; buckets count from 0")
    rows, error = checked_rows(table, entity), None
    if dtype == "int8":
        rows, error = int8_rows(rows, entity)
    elif dtype not in (None, given := dtype_of(rows.schema)):
        raise EmbeddingTableError(f"the rows hold {given}, wanted {dtype}: write_part rounds to int8 only")
    path = Path(directory) / f"part-{bucket:05d}.parquet"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # Vectors hold hardly any repeated value: a dictionary would only cost memory, and zstd makes them 8% smaller
        # but half as fast to read, two thirds as fast to write.
        pq.write_table(
            rows, temporary, compression=_compression(rows.schema), use_dictionary=False, row_group_size=ROW_GROUP_ROWS
        )
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    ids = rows[entity.id_column]
    bounds = {"min_id": ids[0].as_py(), "max_id": ids[-1].as_py()} if rows.num_rows else {}
    entry = describe_file(Path(directory), path, rows=rows.num_rows)
    return entry.model_copy(update={**bounds, "quantisation": error})


def finish_table(
    directory: Path,
    *,
    parts: Sequence[FileEntry],
    dim: int,
    dtype: str,
    tasks: Sequence[str] = (),
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    entity: Entity = USER,
    quality_rows: pa.Table | None = None,
    input_files: Sequence[FileEntry] = (),
) -> Manifest:
    """Commits a table: checks the parts against each other, writes `card.md`, then `manifest.json` last.

    Args:
        directory: holds the parts and nothing else.
        parts: what `write_part` returned, in any order.
        dim: width of the vectors.
        dtype: `float32`, `float16` or `int8`.
        tasks: names of the tasks whose columns the parts have, in that order; items have none.
        facts: JSON-plain; must hold `encoder_digest`, `tokenizer_digest`, `data_digest` and `code_version`. The card
            also shows `name`, `quality` ({measure: {system: value}}), `slices` ({slice: {measure: value}}), `drift`
            ({what: value}), `refresh` (as in `render_card`), `coverage` ({what: number of ids}), `limits` (lines),
            `task_kinds` ({task: kind}) and `task_scores` ({task: {metric: value}}), of all tasks or of some. `id_space`
            names what ids are of: two tables with the same name can be joined (`userrep.publishing.id_space`).
            `bucketing` ({"rule": ..., "count": number of parts}) says how ids are dealt to parts; if it is `bucket_of`,
            that is found out. `created_at` (UTC, ISO 8601) is now unless given.
        config: resolved config of the stage that computed the vectors.
        inputs: input table -> digest of its manifest.
        entity: what a row stands for, as given to `write_part`.
        quality_rows: quality of each user that was measured, from `quality.quality_rows`; kept beside the parts, so
            that a later version can be compared user by user.
        input_files: what `inputs.write_inputs` returned, in any order: what users were encoded from.

    Raises:
        EmbeddingTableError: a fact is missing, reserved or of no task of the table, or an id is in two parts.
        IncompleteTableError: a part differs from its entry, or the directory holds a file that is no given part.
    """
    directory = Path(directory)
    _check_facts(facts, tasks)
    ordered = tuple(sorted(parts, key=lambda entry: entry.path))
    whole = {
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
        "rows": sum(entry.rows or 0 for entry in ordered),
        "dim": dim,
        "dtype": dtype,
        "metric": METRIC,
        "table_sha256": content_sha256(ordered),
        "config_hash": digest_json(dict(config)),
        **({TASKS_FACT: list(tasks)} if tasks else {}),
        **id_space_facts(entity, facts.get(ID_SPACE_FACT)),
        **_quantisation(ordered),
    }
    draft = Manifest(
        table=entity.table, stage="embed", config=dict(config), inputs=dict(inputs), files=ordered, facts=whole
    )
    for name in (CARD_NAME, QUALITY_NAME):
        (directory / name).unlink(missing_ok=True)  # of an attempt that stopped before the manifest
    with_inputs = draft.model_copy(update={"files": (*ordered, *sorted(input_files, key=lambda entry: entry.path))})
    verify_files(directory, with_inputs)
    verify_parts(directory, draft)
    _check_strays(directory, with_inputs)
    check_ids_unique(directory, draft)
    whole |= bucketing_facts(directory, draft)
    (directory / CARD_NAME).write_text(render_card(whole, entity))
    files = [*with_inputs.files, describe_file(directory, directory / CARD_NAME)]
    if quality_rows is not None:
        pq.write_table(quality_rows, directory / QUALITY_NAME, compression="zstd")
        files.append(describe_file(directory, directory / QUALITY_NAME, quality_rows.num_rows))
    manifest = draft.model_copy(update={"files": tuple(files), "facts": whole})
    write_manifest(directory, manifest)
    return manifest


def read_table(directory: Path, verify: bool = True) -> pads.Dataset:
    """Opens a committed table as an Arrow dataset; nothing is loaded yet.

    Args:
        directory: holds `manifest.json`.
        verify: hash every file first. Pass False only directly after a pull or for a table that was just written.

    Raises:
        IncompleteTableError: not a committed table, or (with `verify`) content that differs from the manifest.
    """
    manifest = verify_table(directory) if verify else table_manifest(directory)
    paths = [str(contained_path(directory, entry.path)) for entry in part_entries(manifest)]
    return pads.dataset(paths, schema=schema_of(manifest), format="parquet")


def lookup(dataset: pads.Dataset, ids: Sequence[str]) -> pa.Table:
    """Fetches the rows of some users, or of some items, in the order of `ids` (an id given twice comes twice).

    Ids that the table does not hold (e.g. users without events) are absent: compare `num_rows` with `len(ids)`.

    Raises:
        ValueError: the dataset is no embedding table.
    """
    column = entity_of(dataset.schema).id_column
    wanted = pa.array(ids, pa.string())
    found = dataset.to_table(filter=pc.field(column).isin(wanted)).combine_chunks()
    positions = pc.index_in(wanted, value_set=found[column].combine_chunks())
    return found.take(positions.drop_null())


def _compression(schema: pa.Schema) -> Any:
    """zstd for all but the vectors, by the names that Parquet gives its columns."""
    vectors = vector_columns(schema)
    return {
        **{name: "zstd" for name in schema.names if name not in vectors},
        **{f"{name}.list.element": "none" for name in vectors},
    }


def _quantisation(parts: Sequence[FileEntry]) -> dict[str, Any]:
    """The fact that says what int8 cost, of the vectors that `write_part` rounded."""
    error = joined_errors([entry.quantisation for entry in parts if entry.quantisation])
    return {QUANTISATION_FACT: error.model_dump(mode="json")} if error else {}


def _check_strays(directory: Path, draft: Manifest) -> None:
    named = [*part_entries(draft), *inputs_entries(draft)]
    misnamed = [entry.path for entry in draft.files if entry not in named]
    if strays := [*misnamed, *unlisted_files(directory, draft)]:
        raise IncompleteTableError(f"{directory} holds {strays[0]!r}, no part of this table; use a fresh directory")


def _check_facts(facts: Mapping[str, Any], tasks: Sequence[str]) -> None:
    if missing := [key for key in GIVEN_FACTS if not facts.get(key)]:
        raise EmbeddingTableError(f"facts lack {', '.join(missing)}: a table must say what it was made from")
    if reserved := [key for key in (*DERIVED_FACTS, TASKS_FACT, *OPTIONAL_FACTS) if key in facts]:
        raise EmbeddingTableError(f"facts must not hold {', '.join(reserved)}: finish_table sets them")
    for key in ("task_kinds", "task_scores"):
        if unknown := [task for task in facts.get(key, ()) if task not in tasks]:
            raise EmbeddingTableError(
                f"facts[{key!r}] names {unknown[0]!r}; the tasks of this table are {', '.join(tasks) or 'none'}"
            )
