"""What a row of an embedding table must be: right columns, no nulls, one row per entity, finite vectors of norm 1.

Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from userrep.manifest import QuantisationError
from userrep.publishing.entity import USER, Entity
from userrep.publishing.vectors import joined_errors, norms, quantised
from userrep.schema import TASK_COLUMN_PREFIX, VECTOR_COLUMN, VECTOR_TYPES, scale_column

# Largest distance of a stored norm from 1. float16 rounds each value by at most 2^-11 relative, hence the norm too;
# float32 leaves room for a norm that was computed in float32 over some thousand dimensions. int8 has a factor of
# float32 that makes the norm 1.
NORM_TOLERANCE = {"float32": 1e-4, "float16": 1e-3, "int8": 1e-4}


class EmbeddingTableError(ValueError):
    """Rows or facts that cannot be part of an embedding table. The message names the first offender."""


def checked_rows(table: pa.Table, entity: Entity = USER) -> pa.Table:
    """Returns the rows sorted by id, in one chunk, with the exact published schema.

    Args:
        table: columns of `entity.schema`; which tasks there are is read from the columns.
        entity: what a row stands for.

    Raises:
        EmbeddingTableError: other columns, nulls, duplicate ids, or a vector that is not finite or not of norm 1, in
            any column of vectors.
    """
    schema = _published_schema(table.schema, entity)
    rows = table.combine_chunks().sort_by(entity.id_column)
    vectors = vector_columns(schema)
    for field in schema:
        nulls = rows[field.name].null_count
        if nulls and not field.nullable and field.name not in vectors:
            raise EmbeddingTableError(f"column {field.name!r} holds {nulls} nulls; it must hold none")
    ids = rows[entity.id_column]
    if rows.num_rows > 1:
        repeated = pc.equal(ids[1:].combine_chunks(), ids[:-1].combine_chunks())
        if (at := pc.index(repeated, True).as_py()) >= 0:
            raise EmbeddingTableError(
                f"{entity.name} {ids[at].as_py()!r} has more than one row; one row per {entity.name} and table"
            )
    for name in vectors:
        _check_vectors(rows, name, entity)
    return pa.Table.from_arrays([rows[name].combine_chunks() for name in schema.names], schema=schema)


def int8_rows(rows: pa.Table, entity: Entity = USER) -> tuple[pa.Table, QuantisationError | None]:
    """The rows with all vectors rounded to int8, and what that cost; those that are int8 already come back as they are.

    Args:
        rows: from `checked_rows`.
        entity: what a row stands for.
    """
    if dtype_of(rows.schema) == "int8":
        return rows, None
    names = vector_columns(rows.schema)
    columns, errors = {name: rows[name] for name in rows.schema.names}, []
    for name in names:
        columns[name], columns[scale_column(name)], error = quantised(rows[name].combine_chunks())
        errors += [error] if error else []
    tasks = [name.removeprefix(TASK_COLUMN_PREFIX) for name in names if name != VECTOR_COLUMN]
    schema = entity.schema(rows.schema.field(VECTOR_COLUMN).type.list_size, "int8", tasks)
    return pa.table([columns[name] for name in schema.names], schema=schema), joined_errors(errors)


def vector_columns(schema: pa.Schema) -> list[str]:
    """Names of the columns that hold vectors, the universal one first."""
    return [field.name for field in schema if pa.types.is_fixed_size_list(field.type)]


def dtype_of(schema: pa.Schema) -> str | None:
    """`float32`, `float16` or `int8`: the type of a table's vectors; None where it has none."""
    column: Any = schema.field(VECTOR_COLUMN).type if VECTOR_COLUMN in schema.names else None
    if column is None or not pa.types.is_fixed_size_list(column):
        return None
    return next((name for name, type_ in VECTOR_TYPES.items() if type_ == column.value_type), None)


def columns_text(schema: pa.Schema) -> str:
    """Columns as `name: type, ...` for messages."""
    return ", ".join(f"{field.name}: {field.type}" for field in schema)


def _published_schema(schema: pa.Schema, entity: Entity) -> pa.Schema:
    """The published schema with this table's width, type and tasks; the given one must equal it but for nullability."""
    allowed = f"userrep.schema.{entity.table}, of float32, float16 or int8"
    dtype = dtype_of(schema)
    if dtype is None:
        raise EmbeddingTableError(f"received columns {columns_text(schema)}; allowed is {allowed}")
    column: Any = schema.field(VECTOR_COLUMN).type
    task_fields = [field for field in schema if field.name.startswith(TASK_COLUMN_PREFIX)]
    if other := [field for field in task_fields if field.type != column]:
        raise EmbeddingTableError(
            f"column {other[0].name!r} is {other[0].type}, 'embedding' is {column}: all vectors of a table have one "
            "width and type"
        )
    try:
        wanted = entity.schema(
            column.list_size, dtype, [field.name.removeprefix(TASK_COLUMN_PREFIX) for field in task_fields]
        )
    except ValueError as error:
        raise EmbeddingTableError(f"received columns {columns_text(schema)}: {error}") from error
    if [(field.name, field.type) for field in schema] != [(field.name, field.type) for field in wanted]:
        raise EmbeddingTableError(
            f"received columns {columns_text(schema)}; allowed is {allowed}: {columns_text(wanted)}"
        )
    return wanted


def _check_vectors(rows: pa.Table, name: str, entity: Entity) -> None:
    """No nulls, and norm 1 within the tolerance of the type; what is not finite gives a norm that is not finite."""
    if rows.num_rows == 0:
        return
    vectors = rows[name].combine_chunks()
    found = norms(rows, name)
    if found.null_count:
        nulls = vectors.null_count + pc.list_flatten(vectors).null_count
        first = rows[entity.id_column][pc.index(found.is_null(), True).as_py()].as_py()
        raise EmbeddingTableError(
            f"column {name!r} holds {nulls} nulls, the first of {entity.name} {first!r}; it must hold none"
        )
    tolerance = NORM_TOLERANCE[str(dtype_of(rows.schema))]
    # `not (error <= tolerance)` also catches NaN, which compares false.
    bad = pc.invert(pc.less_equal(pc.abs(pc.subtract(found, 1.0)), tolerance))
    if (at := pc.index(bad, True).as_py()) >= 0:
        raise EmbeddingTableError(
            f"{entity.name} {rows[entity.id_column][at].as_py()!r} has a vector of norm {found[at].as_py():.6g} in "
            f"column {name!r}, allowed is 1 +- {tolerance}: normalise the vectors, leave out {entity.absent} (count "
            "them in facts['coverage'])"
        )
