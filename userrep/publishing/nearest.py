"""The nearest users or items of some vectors: exact, block by block, in bounded memory.

Vectors are compared by cosine. A block's products are taken in float32, which finds all that can be among the nearest;
those are measured again in float64, so that equal vectors are equally near wherever they are stored.
Needs numpy, which the bare install lacks: `pip install 'userrep[tables]'`.

Legend: `Q` queries, `N` rows of a block, `D` dimensions, `P` pairs of a query and a row.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.manifest import IncompleteTableError, Manifest, contained_path
from userrep.publishing.entity import ENTITIES
from userrep.publishing.lookup import lookup_ids
from userrep.publishing.pairs import matrix
from userrep.publishing.vectors import stored_columns
from userrep.publishing.verify import part_entries, schema_of, table_manifest
from userrep.schema import VECTOR_COLUMN

ROWS_AT_ONCE = 16_384
QUERIES_AT_ONCE = 256  # 17 MB of products with a block
PAIRS_AT_ONCE = 16_384  # that are measured in float64: 34 MB at 128 dimensions
FOUND = pa.schema([("query", pa.int64()), ("id", pa.string()), ("cosine", pa.float64())])
ORDER = [("query", "ascending"), ("cosine", "descending"), ("id", "ascending")]


class NearestError(ValueError):
    """Vectors that cannot be compared, or an id that has none."""


def nearest(directory: Path, query_QD: np.ndarray, k: int, *, column: str = VECTOR_COLUMN) -> pa.Table:
    """Finds the rows of a table whose vectors have the largest cosine with each query.

    Args:
        directory: of a pulled embedding table of any dtype; it is read once for every `QUERIES_AT_ONCE` queries.
        query_QD: vectors of any length but zero.
        k: how many for each query, >= 1; fewer come where the table has fewer.
        column: of vectors.

    Returns:
        Columns `query` (row of `query_QD`), `id` and `cosine`: sorted by query, then the nearest first, then by id.

    Raises:
        NearestError: queries of another width, not finite, or zero; `k` below 1.
        ValueError: the table has no such column.
        IncompleteTableError: it is no table, or a part cannot be read.
    """
    manifest = table_manifest(directory)
    unit_QD = _units(query_QD, manifest.facts["dim"])
    if k < 1:
        raise NearestError(f"k is {k}; at least 1 row can be asked for")
    if column != VECTOR_COLUMN:
        stored_columns(schema_of(manifest), [column])
    chunks = [FOUND.empty_table()]
    for start in range(0, len(unit_QD), QUERIES_AT_ONCE):
        found = FOUND.empty_table()
        chunk_QD = unit_QD[start : start + QUERIES_AT_ONCE]
        for ids, block_ND in _blocks(Path(directory), manifest, column):
            found = _merged(found, ids, block_ND, chunk_QD, k)
        queries = pa.array(found["query"].to_numpy() + start)
        chunks.append(found.set_column(0, FOUND.field(0), queries))
    return pa.concat_tables(chunks).combine_chunks()


def nearest_to_ids(
    directory: Path, ids: Sequence[str], k: int, *, among: Path | None = None, column: str = VECTOR_COLUMN
) -> pa.Table:
    """As `nearest`, of users or items of the table; the column `query` holds their ids.

    Args:
        directory: of a pulled table that has the ids.
        ids: one that is given twice is asked once.
        k: how many for each.
        among: another table, e.g. of items, made by the same encoder; None for `directory`, without the id itself.
        column: of vectors.

    Raises:
        NearestError: an id has no row, or the two tables are of two encoders; else as `nearest`.
    """
    rows = lookup_ids(directory, list(dict.fromkeys(ids)), [column])
    manifest = table_manifest(directory)
    have = rows[ENTITIES[manifest.table].id_column].to_pylist()
    if lacking := sorted(set(ids) - set(have)):
        raise NearestError(f"{lacking[0]!r} has no row in {directory}: {ENTITIES[manifest.table].absent} have none")
    if among is not None:
        _check_comparable(manifest, table_manifest(among))
    found = nearest(among or directory, matrix(rows, column), k if among else k + 1, column=column)
    names = pa.array(have, pa.string()).take(found["query"].combine_chunks())
    found = found.set_column(0, "query", names)
    if among is not None:
        return found
    others = found.take(pc.indices_nonzero(pc.not_equal(found["query"], found["id"])))
    return others.take(np.flatnonzero(_rank(others["query"].to_numpy()) < k))


def _check_comparable(left: Manifest, right: Manifest) -> None:
    encoders = [manifest.facts["encoder_digest"] for manifest in (left, right)]
    if encoders[0] != encoders[1]:
        raise NearestError(
            f"one table is of encoder {encoders[0]}, the other of {encoders[1]}: their vectors lie in different "
            "spaces. Pull two tables of one training"
        )


def _units(query_QD: np.ndarray, dim: int) -> np.ndarray:
    """Queries of norm 1, float64."""
    query_QD = np.asarray(query_QD)
    if query_QD.ndim != 2 or query_QD.shape[1] != dim:
        raise NearestError(f"queries have the shape {query_QD.shape}; wanted (queries, {dim}), the width of the table")
    if query_QD.dtype.kind not in "fiu":
        raise NearestError(f"queries are {query_QD.dtype}; wanted are numbers")
    query_QD = query_QD.astype(np.float64)
    norm_Q = np.linalg.norm(query_QD, axis=1)
    if (bad_Q := np.flatnonzero(~(np.isfinite(norm_Q) & (norm_Q > 0)))).size:
        raise NearestError(f"query {bad_Q[0]} has norm {norm_Q[bad_Q[0]]}; it has no direction")
    return query_QD / norm_Q[:, None]


def _blocks(directory: Path, manifest: Manifest, column: str) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Ids and vectors of a table, some rows at a time; float32 (N, D)."""
    id_column = ENTITIES[manifest.table].id_column
    names = stored_columns(schema_of(manifest), [id_column, column])
    for entry in part_entries(manifest):
        path = contained_path(directory, entry.path)
        try:
            with pq.ParquetFile(path, memory_map=True) as part:
                for batch in part.iter_batches(ROWS_AT_ONCE, columns=names):
                    yield batch[id_column], matrix(pa.table(batch), column)
        except (OSError, pa.ArrowInvalid) as error:
            raise IncompleteTableError(f"{path} cannot be read ({error}); pull the table again") from error


def _merged(found: pa.Table, ids: pa.Array, block_ND: np.ndarray, unit_QD: np.ndarray, k: int) -> pa.Table:
    """The k nearest of what was found and of another block, for each query."""
    norm_N = np.linalg.norm(block_ND, axis=1)
    near_QN = (unit_QD.astype(np.float32) @ block_ND.T) / norm_N
    # Error of a float32 dot product of unit vectors, twice: of the row that is k-th, and of one that might be nearer.
    slack = 2 * (block_ND.shape[1] + 2) * float(np.finfo(np.float32).eps)
    bound_Q = np.full(len(unit_QD), -np.inf)
    if block_ND.shape[0] >= k:
        bound_Q = np.partition(near_QN, -k, axis=1)[:, -k].astype(np.float64)
    query_F, cosine_F = found["query"].to_numpy(), found["cosine"].to_numpy()
    is_kth_F = _rank(query_F) == k - 1
    bound_Q[query_F[is_kth_F]] = np.maximum(bound_Q[query_F[is_kth_F]], cosine_F[is_kth_F])
    query_P, row_P = np.nonzero(near_QN >= (bound_Q - slack)[:, None])
    for start in range(0, len(query_P), PAIRS_AT_ONCE):
        query, row = query_P[start : start + PAIRS_AT_ONCE], row_P[start : start + PAIRS_AT_ONCE]
        row_PD = block_ND[row].astype(np.float64)
        cosine = (unit_QD[query] * row_PD).sum(axis=1) / np.sqrt((row_PD * row_PD).sum(axis=1))
        more = pa.table([pa.array(query), ids.take(pa.array(row)), pa.array(cosine)], schema=FOUND)
        found = pa.concat_tables([found, more]).combine_chunks().sort_by(ORDER)
        found = found.take(np.flatnonzero(_rank(found["query"].to_numpy()) < k))
    return found


def _rank(sorted_P: np.ndarray) -> np.ndarray:
    """Position of each value among its equals, which follow one another."""
    if not len(sorted_P):
        return np.empty(0, np.int64)
    starts = np.flatnonzero(np.concatenate([[True], sorted_P[1:] != sorted_P[:-1]]))
    return np.arange(len(sorted_P)) - np.repeat(starts, np.diff(np.append(starts, len(sorted_P))))
