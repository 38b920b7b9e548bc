"""The rotation that turns vectors of a table into the space of an earlier one, fitted on what both hold.

A new training gives new axes, so whatever was learned from the vectors of one version fails on those of the next. Most
of the change is a rotation, and that can be undone. Needs numpy: `pip install 'userrep[tables]'`.

Source: Schoenemann (1966), "A generalized solution of the orthogonal Procrustes problem": of all orthogonal R, the one
with the least |X R - Y| is U V', where U S V' is the singular value decomposition of X' Y.

Legend: `N` common ids, `D` dimensions; row vectors, so mapped_ND = new_ND @ map_DD.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

MAP_NAME = "alignment.parquet"
HELD_OUT_EVERY = 10  # each tenth common id, in the order of the table, is not fitted on
CHUNK_ROWS = 8192  # products are summed in float32 within a chunk, in float64 over chunks
MIN_ROWS_PER_DIM = 2  # common ids a dimension; with fewer, a rotation fits noise


class AlignmentError(ValueError):
    """Vectors of one version cannot be turned into the space of another."""


@dataclass(frozen=True)
class Map:
    """An orthogonal map from the vectors of one version to those of another, of one column.

    Attributes:
        column: which vectors.
        matrix: float64 (D, D); vectors are rows, so they stand on its left.
        held_out: common ids that the figures are of; they were not fitted on.
        mean_cosine: of a mapped vector and the old one.
        unmapped_cosine: of the same vectors without the map.
    """

    column: str
    matrix: np.ndarray
    held_out: int
    mean_cosine: float
    unmapped_cosine: float

    def inverse(self) -> "Map":
        """The map of the other direction; its measured loss is the same, as cosines do not change under rotations."""
        return replace(self, matrix=self.matrix.T)


class ProcrustesSums:
    """Collects in one pass what the map and its loss are made from: two matrices of D x D, whatever the rows."""

    def __init__(self, column: str, dim: int) -> None:
        self._column = column
        self._fit_DD, self._held_out_DD = np.zeros((2, dim, dim))
        self._seen = self._held_out = 0

    def add(self, old_ND: np.ndarray, new_ND: np.ndarray) -> None:
        """Adds vectors of the same ids, both of norm 1."""
        for start in range(0, len(old_ND), CHUNK_ROWS):
            old, new = old_ND[start : start + CHUNK_ROWS], new_ND[start : start + CHUNK_ROWS]
            is_held_out = (self._seen + np.arange(len(old))) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
            held_out_DD = new[is_held_out].T @ old[is_held_out]
            self._held_out_DD += held_out_DD
            self._fit_DD += new.T @ old - held_out_DD
            self._seen += len(old)
            self._held_out += int(is_held_out.sum())

    def solve(self) -> Map:
        """The map, and its loss on ids that it was not fitted on.

        Raises:
            AlignmentError: too few ids are in both tables.
        """
        dim = len(self._fit_DD)
        if self._seen < max(HELD_OUT_EVERY, MIN_ROWS_PER_DIM * dim):
            raise AlignmentError(
                f"{self._seen} ids are in both tables, a map of {dim} dimensions needs "
                f"{max(HELD_OUT_EVERY, MIN_ROWS_PER_DIM * dim)}"
            )
        left_DD, _, right_DD = np.linalg.svd(self._fit_DD)
        map_DD = left_DD @ right_DD
        # Vectors have norm 1, so the sum of cosines over rows is the sum of products of these matrices.
        mapped, unmapped = float((map_DD * self._held_out_DD).sum()), float(np.trace(self._held_out_DD))
        return Map(self._column, map_DD, self._held_out, mapped / self._held_out, unmapped / self._held_out)


def write_maps(path: Path, maps: list[Map], facts: dict[str, object]) -> str:
    """Writes maps of several columns as Parquet, one row a dimension. Returns the sha256 of the file.

    Args:
        path: of the file.
        maps: all of the same width.
        facts: JSON-plain; what the maps lead from and to.
    """
    dim = len(maps[0].matrix)
    weights = np.concatenate([one.matrix.ravel() for one in maps])
    figures = [
        {key: getattr(one, key) for key in ("column", "held_out", "mean_cosine", "unmapped_cosine")} for one in maps
    ]
    table = pa.table(
        {
            "column": pa.array([one.column for one in maps for _ in range(dim)], pa.string()),
            "row": pa.FixedSizeListArray.from_arrays(pa.array(weights), dim),
        }
    )
    texts = {b"facts": json.dumps(facts, sort_keys=True), b"figures": json.dumps(figures)}
    pq.write_table(table.replace_schema_metadata(texts), path, compression="none", use_dictionary=False)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_maps(path: Path) -> list[Map]:
    """Reads what `write_maps` wrote.

    Raises:
        AlignmentError: the file is no set of orthogonal maps.
    """
    try:
        table = pq.read_table(path)
        figures = json.loads((table.schema.metadata or {})[b"figures"])
        rows = table["row"].combine_chunks()
        maps_CDD = rows.flatten().to_numpy().reshape(len(figures), rows.type.list_size, rows.type.list_size)
        maps = [Map(matrix=map_DD, **figure) for map_DD, figure in zip(maps_CDD, figures, strict=True)]
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, AttributeError) as error:
        raise AlignmentError(f"{path.name} holds no maps between versions ({error})") from error
    for one in maps:
        if not np.allclose(one.matrix @ one.matrix.T, np.eye(len(one.matrix)), atol=1e-6):
            raise AlignmentError(f"{path.name} holds a map of {one.column!r} that is not orthogonal")
    return maps
