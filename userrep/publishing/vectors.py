"""Vectors as they are stored, and as float32: the one place that knows how int8 is read and written.

An int8 vector is the vector over its largest absolute value, in steps of 1/127, rounded; a factor beside it (column
`scale`) makes its norm 1 again, so that what is read back is a unit vector whatever was lost in its direction.
Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from userrep.manifest import QuantisationError
from userrep.schema import VECTOR_COLUMN, scale_column

LEVELS = 127  # of one sign; -128 stays unused, so that a vector and its negative are rounded alike
ROWS_AT_ONCE = 16_384  # which are quantised together: some ten bytes a value besides the vectors


def float32_vectors(rows: pa.Table | pa.RecordBatch, column: str = VECTOR_COLUMN) -> pa.FixedSizeListArray:
    """The vectors of a table of any dtype, as float32; L2 norm 1.

    `.flatten()` of the result is the matrix row by row: `.flatten().to_numpy().reshape(len(rows), -1)`.

    Args:
        rows: of an embedding table; of int8 vectors also the column `userrep.schema.scale_column(column)`.
        column: which vectors.

    Raises:
        ValueError: there is no such column, or its factors are missing.
    """
    vectors = _column(rows, column)
    kind: Any = vectors.type
    if pa.types.is_float32(kind.value_type):
        return vectors
    values = vectors.flatten().cast(pa.float32())
    if pa.types.is_int8(kind.value_type):
        values = pc.multiply(values, _column(rows, scale_column(column)).take(pc.list_parent_indices(vectors)))
    return pa.FixedSizeListArray.from_arrays(values, kind.list_size)


def rows_dtype(dtype: str) -> str:
    """Type in which rows of a table of `dtype` are computed: `write_part` rounds to int8 itself."""
    return "float32" if dtype == "int8" else dtype


def norms(rows: pa.Table, column: str) -> Any:
    """L2 norm of each vector as it is stored, float64; null where the vector or one of its values is null."""
    vectors = _column(rows, column)
    found = pc.sqrt(_dots(vectors, vectors))
    if pa.types.is_int8(vectors.type.value_type):
        found = pc.multiply(found, pc.cast(_column(rows, scale_column(column)), pa.float64()))
    return found


def quantised(vectors: pa.FixedSizeListArray) -> tuple[pa.FixedSizeListArray, pa.Array, QuantisationError | None]:
    """Rounds unit vectors to int8.

    Args:
        vectors: of float32 or float16, without nulls, none of them zero.

    Returns:
        The integers, their factors, and what that cost; None of no vectors.
    """
    kind: Any = vectors.type
    pieces = [_quantised(vectors[start : start + ROWS_AT_ONCE]) for start in range(0, len(vectors), ROWS_AT_ONCE)]
    empty = pa.array([], pa.list_(pa.int8(), kind.list_size))
    integers = pa.concat_arrays([empty, *(piece[0] for piece in pieces)])
    scales = pa.concat_arrays([pa.array([], pa.float32()), *(piece[1] for piece in pieces)])
    return integers, scales, joined_errors([piece[2] for piece in pieces])


def joined_errors(errors: list[QuantisationError]) -> QuantisationError | None:
    """The error of several sets of vectors together; None of none."""
    total = sum(error.vectors for error in errors)
    if not total:
        return None
    return QuantisationError(
        vectors=total,
        mean_cosine=sum(error.mean_cosine * error.vectors for error in errors) / total,
        min_cosine=min(error.min_cosine for error in errors),
        max_abs_error=max(error.max_abs_error for error in errors),
    )


def _quantised(vectors: pa.FixedSizeListArray) -> tuple[pa.FixedSizeListArray, pa.Array, QuantisationError]:
    kind: Any = vectors.type
    values, parents = vectors.flatten().cast(pa.float32()), pc.list_parent_indices(vectors)
    sizes = [pc.abs(pc.cast(pc.list_element(vectors, place), pa.float32())) for place in range(kind.list_size)]
    steps = pc.divide(pc.max_element_wise(*sizes), pa.scalar(LEVELS, pa.float32()))
    integers = pc.cast(pc.round(pc.divide(values, steps.take(parents))), pa.int8())
    rounded = pa.FixedSizeListArray.from_arrays(integers, kind.list_size)
    lengths = pc.sqrt(_dots(rounded, rounded))
    scales = pc.cast(pc.divide(1.0, lengths), pa.float32())
    cosines = pc.divide(_dots(rounded, vectors), pc.multiply(lengths, pc.sqrt(_dots(vectors, vectors))))
    read_back = pc.multiply(pc.cast(integers, pa.float32()), scales.take(parents))
    error = QuantisationError(
        vectors=len(vectors),
        mean_cosine=pc.mean(cosines).as_py(),
        min_cosine=pc.min(cosines).as_py(),
        max_abs_error=pc.max(pc.abs(pc.subtract(read_back, values))).as_py(),
    )
    return rounded, scales, error


def _column(rows: pa.Table | pa.RecordBatch, name: str) -> Any:
    if name not in rows.schema.names:
        raise ValueError(f"received columns {', '.join(rows.schema.names)}; wanted {name!r} among them")
    column = rows[name]
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _dots(left: Any, right: Any) -> Any:
    """Dot product of each pair of vectors, float64."""
    total: Any = None
    # Dimension by dimension: arrow has no sum over a row, and this never holds more than a column of it as float64.
    for place in range(left.type.list_size):
        product = pc.multiply(
            pc.cast(pc.list_element(left, place), pa.float64()), pc.cast(pc.list_element(right, place), pa.float64())
        )
        total = product if total is None else pc.add(total, product)
    return total
