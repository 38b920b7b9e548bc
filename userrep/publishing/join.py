"""Vectors beside events: an embedding table joined onto any table that names its users or items.

Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from userrep.manifest import Manifest
from userrep.publishing.entity import ENTITIES
from userrep.publishing.id_space import ID_SPACE_FACT, IdSpaceMismatchError, check_ids_of
from userrep.publishing.lookup import lookup_ids
from userrep.publishing.rows import vector_columns
from userrep.publishing.vectors import float32_vectors
from userrep.publishing.verify import schema_of, table_manifest
from userrep.schema import VECTOR_COLUMN


def join(
    events: pa.Table,
    directory: Path,
    *,
    on: str | None = None,
    how: Literal["left", "inner"] = "left",
    columns: Sequence[str] = (VECTOR_COLUMN,),
    id_space: str | None = None,
) -> pa.Table:
    """Adds columns of an embedding table to events, by user or by item; the events stay in their order.

    Memory: the events' rows times the width of what is added. Join a long log batch by batch.

    Args:
        events: any columns; an id may come many times, or be null.
        directory: of a pulled embedding table.
        on: column of the events with the ids, of strings; by default `user_id` or `item_id`, as the table's rows are.
        how: `left` keeps every event, with nulls where the table has no row; `inner` drops those.
        columns: of the embedding table; vectors come as float32, whatever they are stored as.
        id_space: what the events' ids are of (config key `embed.id_space` of the table's job). By default as the key
            `id_space` of the events' schema metadata says, else the table is taken at its word.

    Raises:
        IdSpaceMismatchError: the events' ids are of another id space, or of items where the table's are of users.
        ValueError: a column is missing, there already, or not of strings.
        IncompleteTableError: as `lookup_ids`.
    """
    if how not in ("left", "inner"):
        raise ValueError(f"how={how!r}: allowed are 'left' and 'inner'")
    manifest = table_manifest(directory)
    ids = _ids(events, manifest, on, id_space)
    if there := [name for name in columns if name in events.schema.names]:
        raise ValueError(f"the events have a column {there[0]!r} already: rename it, or ask for other columns")
    rows = lookup_ids(directory, pc.unique(ids).drop_null().to_pylist(), columns)
    places = pc.index_in(ids, value_set=rows[ENTITIES[manifest.table].id_column].combine_chunks())
    if how == "inner":
        is_found = places.is_valid()
        events, places = events.filter(is_found), places.filter(is_found)
    vectors = vector_columns(schema_of(manifest))
    for name in columns:
        values = float32_vectors(rows, name) if name in vectors else rows[name].combine_chunks()
        events = events.append_column(name, values.take(places))
    return events


def _ids(events: pa.Table, manifest: Manifest, on: str | None, id_space: str | None) -> Any:
    """The events' ids as one array of strings, if they are ids of the table."""
    entity = ENTITIES[manifest.table]
    on = on or entity.id_column
    if others := [other.name for other in ENTITIES.values() if on == other.id_column and other is not entity]:
        raise IdSpaceMismatchError(f"the table is of {entity.name}s, column {on!r} holds ids of {others[0]}s")
    if on not in events.schema.names:
        raise ValueError(f"the events have the columns {', '.join(events.schema.names)}, not {on!r}: say on=...")
    stated = (events.schema.metadata or {}).get(ID_SPACE_FACT.encode())
    check_ids_of(manifest, id_space or (stated.decode() if stated else None))
    column: Any = events[on]
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(
            f"column {on!r} of the events is {column.type}; ids are strings: cast it as they were ingested"
        )
    return column.cast(pa.string()).combine_chunks()
