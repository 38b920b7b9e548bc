"""Rows of some ids, from the parts and row groups that can hold them; what cannot is not opened.

Needs pyarrow only (no numpy, no torch).
"""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import os
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.manifest import FileEntry, IncompleteTableError, Manifest, contained_path
from userrep.publishing.entity import ENTITIES
from userrep.publishing.vectors import stored_columns
from userrep.publishing.verify import BUCKET_RULE, BUCKETING_FACT, bucket_of, part_entries, schema_of, table_manifest

PARTS_AT_ONCE = 4  # each holds a row group: 8 MB at 128 float32


def lookup_ids(directory: Path, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """Fetches the rows of some users, or of some items, in the order of `ids` (an id given twice comes twice).

    Ids that the table does not hold (e.g. users without events) are absent: compare `num_rows` with `len(ids)`.

    Args:
        directory: of a pulled table; nothing is verified again.
        ids: any number of them.
        columns: the id comes always, and the factors of int8 vectors with these; None for all columns.

    Raises:
        ValueError: the table has no such column.
        IncompleteTableError: it is no table, or a part is missing or cannot be read.
    """
    manifest = table_manifest(directory)
    schema, id_column = schema_of(manifest), ENTITIES[manifest.table].id_column
    names = schema.names if columns is None else stored_columns(schema, [id_column, *columns])
    wanted = _by_part(manifest, sorted(set(ids)))
    with ThreadPoolExecutor(min(PARTS_AT_ONCE, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda one: _rows(contained_path(directory, one[0].path), one[1], names), wanted)
        tables = [table for tables in found for table in tables]
    empty = pa.schema([schema.field(name) for name in names]).empty_table()
    rows = pa.concat_tables([empty, *tables]).combine_chunks()
    places = pc.index_in(pa.array(ids, pa.string()), value_set=rows[id_column].combine_chunks())
    return rows.take(places.drop_null())


def _by_part(manifest: Manifest, wanted: list[str]) -> list[tuple[FileEntry, list[str]]]:
    """The parts that can hold some of the sorted ids, and these: by the rule that deals ids to parts, and by range."""
    parts = part_entries(manifest)
    shares = [wanted] * len(parts)
    if _is_dealt(manifest, parts):
        dealt = defaultdict[int, list[str]](list)
        for one in wanted:
            dealt[bucket_of(one, len(parts))].append(one)
        shares = [dealt[number] for number in range(len(parts))]
    within = [_within(share, entry.min_id, entry.max_id) for entry, share in zip(parts, shares, strict=True)]
    return [(entry, share) for entry, share in zip(parts, within, strict=True) if share]


def _is_dealt(manifest: Manifest, parts: Sequence[FileEntry]) -> bool:
    """Whether part number N holds the ids of bucket N, as the manifest says."""
    is_complete = [entry.path for entry in parts] == [f"part-{number:05d}.parquet" for number in range(len(parts))]
    return is_complete and manifest.facts.get(BUCKETING_FACT) == {"rule": BUCKET_RULE, "count": len(parts)}


def _within(ids: list[str], low: str | None, high: str | None) -> list[str]:
    """Those of the sorted ids in a closed range; all where the range is unknown."""
    if low is None or high is None:
        return ids
    return ids[bisect_left(ids, low) : bisect_right(ids, high)]


def _rows(path: Path, wanted: list[str], columns: list[str]) -> list[pa.Table]:
    """The rows of the sorted ids in a part, by row group."""
    try:
        with pq.ParquetFile(path, memory_map=True) as part:
            return list(_rows_of(part, wanted, columns))
    except (OSError, pa.ArrowInvalid) as error:
        raise IncompleteTableError(f"{path} cannot be read ({error}); pull the table again") from error


def _rows_of(part: pq.ParquetFile, wanted: list[str], columns: list[str]) -> Iterator[pa.Table]:
    id_column = part.schema_arrow.names[0]
    for number in range(part.metadata.num_row_groups):
        bounds = part.metadata.row_group(number).column(0).statistics
        inside = _within(wanted, bounds.min, bounds.max) if bounds is not None and bounds.has_min_max else wanted
        if not inside:
            continue
        ids = part.read_row_group(number, columns=[id_column], use_threads=False)[id_column]
        places = pc.indices_nonzero(pc.is_in(ids, value_set=pa.array(inside, pa.string())))
        if len(places):
            yield part.read_row_group(number, columns=columns, use_threads=False).take(places)
