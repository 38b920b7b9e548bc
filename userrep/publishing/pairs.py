"""Two tables side by side in bounded memory: the rows of a share of the ids from both, share after share.

Tables with the same bucketing are read part by part. Others are read by ranges of ids, which row groups that are sorted
by id make cheap. Needs numpy, which the bare install lacks: `pip install 'userrep[tables]'`.

Legend: `N` rows, `D` dimensions.
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.manifest import Manifest, contained_path
from userrep.publishing.entity import ENTITIES, Entity
from userrep.publishing.id_space import check_same_ids
from userrep.publishing.rows import vector_columns
from userrep.publishing.table import read_table
from userrep.publishing.vectors import float32_vectors
from userrep.publishing.verify import BUCKETING_FACT, part_entries, schema_of, table_manifest
from userrep.schema import scale_column

RANGE_ROWS = 65_536  # ids of the old table that a range holds


def matrix(rows: pa.Table, column: str) -> np.ndarray:
    """Vectors of a table of any dtype, float32 (N, D)."""
    vectors = float32_vectors(rows, column)
    return vectors.flatten().to_numpy(zero_copy_only=False).reshape(len(vectors), vectors.type.list_size)


@dataclass(frozen=True)
class Share:
    """Rows of some ids from both tables, each sorted by id or by part and id."""

    old: pa.Table
    new: pa.Table
    id_column: str

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the ids that both have, int64: in `old` and in `new`, in the order of `new`."""
        found = pc.index_in(self.new[self.id_column], value_set=self.old[self.id_column].combine_chunks())
        in_old = found.combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        in_new = np.flatnonzero(in_old >= 0)
        return in_old[in_new], in_new

    def vectors(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """Vectors of the ids that both have, in the order of `new`: old (N, D) and new (N, D'), float32."""
        old_N, new_N = self.places
        old_ND, new_ND = matrix(self.old, column), matrix(self.new, column)
        is_all = len(old_N) == len(old_ND) == len(new_ND) and bool((old_N == new_N).all())
        return (old_ND, new_ND) if is_all else (old_ND[old_N], new_ND[new_N])


class TablePair:
    """Two committed tables of the same kind of ids."""

    def __init__(self, old: Path, new: Path) -> None:
        """Reads both manifests.

        Raises:
            IncompleteTableError: a directory holds no embedding table.
            IdSpaceMismatchError: equal ids do not mean the same.
        """
        self.old, self.new = table_manifest(old), table_manifest(new)
        check_same_ids(self.old, self.new)
        self._directories = (Path(old), Path(new))

    @property
    def entity(self) -> Entity:
        """What a row of both stands for."""
        return ENTITIES[self.old.table]

    @property
    def vector_columns(self) -> list[str]:
        """Columns of vectors that both have, the universal one first."""
        there = vector_columns(schema_of(self.new))
        return [name for name in vector_columns(schema_of(self.old)) if name in there]

    def dims(self) -> tuple[int, int]:
        """Width of the vectors of the old and of the new table."""
        return self.old.facts["dim"], self.new.facts["dim"]

    def shares(self, columns: Sequence[str]) -> Iterator[Share]:
        """All rows of both tables, each in one share.

        Args:
            columns: of vectors, read beside the ids.
        """
        names = [_with_scales(manifest, self.entity, columns) for manifest in (self.old, self.new)]
        buckets = [manifest.facts.get(BUCKETING_FACT) for manifest in (self.old, self.new)]
        shares = self._by_part(names) if buckets[0] and buckets[0] == buckets[1] else self._by_range(names)
        for old, new in shares:
            yield Share(old, new, self.entity.id_column)

    def _by_part(self, names: list[list[str]]) -> Iterator[tuple[pa.Table, pa.Table]]:
        for entries in zip(part_entries(self.old), part_entries(self.new), strict=True):
            old, new = (
                pq.read_table(contained_path(directory, entry.path), columns=columns, memory_map=True)
                for directory, entry, columns in zip(self._directories, entries, names, strict=True)
            )
            yield old, new

    def _by_range(self, names: list[list[str]]) -> Iterator[tuple[pa.Table, pa.Table]]:
        column = pc.field(self.entity.id_column)
        datasets = [read_table(directory, verify=False) for directory in self._directories]
        ids = datasets[0].to_table(columns=[self.entity.id_column])[self.entity.id_column]
        order = pc.sort_indices(ids)
        firsts = ids.take(order[::RANGE_ROWS]).to_pylist()[1:]
        for low, high in zip([None, *firsts], [*firsts, None], strict=True):
            within = pc.scalar(True)
            if low is not None:
                within &= column >= low
            if high is not None:
                within &= column < high
            old, new = (
                dataset.to_table(columns=columns, filter=within)
                for dataset, columns in zip(datasets, names, strict=True)
            )
            yield old, new


def _with_scales(manifest: Manifest, entity: Entity, columns: Sequence[str]) -> list[str]:
    scales = [scale_column(name) for name in columns] if manifest.facts["dtype"] == "int8" else []
    return [entity.id_column, *columns, *scales]
