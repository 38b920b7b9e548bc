"""Files of every kind that can name a user, without some users."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

USER_COLUMN = "user_id"


def erase_rows(source: Path, target: Path, ids: pa.Array) -> int:
    """A Parquet file with a column `user_id`, row group by row group."""
    return filter_parquet(source, target, USER_COLUMN, ids)


def filter_parquet(source: Path, target: Path, column: str, values: pa.Array) -> int:
    """Writes a Parquet file without the rows that have one of some values. Returns how many there were.

    Args:
        source: the file.
        target: written only where there are such rows.
        column: of the values; a file without it is left as it is.
        values: of the column's type.
    """
    if column not in pq.read_schema(source).names:
        return 0
    present = pc.is_in(pq.read_table(source, columns=[column])[column], value_set=values)
    if not (num_found := pc.sum(present).as_py() or 0):
        return 0
    with pq.ParquetFile(source) as file, pq.ParquetWriter(target, file.schema_arrow, compression="zstd") as writer:
        for number in range(file.num_row_groups):
            rows = file.read_row_group(number)
            kept = rows.filter(pc.invert(pc.is_in(rows[column], value_set=values)))
            if kept.num_rows:
                writer.write_table(kept, row_group_size=kept.num_rows)
    return num_found


def erase_lines(source: Path, target: Path, ids: pa.Array) -> int:
    """A file of JSON lines without those that name a user anywhere, whole or as a word of a text.

    A record in quarantine is kept as it was read, so it cannot be asked what its user is: it goes if it holds the id,
    also if that is an item's.
    """
    pattern = names_of(ids)
    with source.open(encoding="utf-8") as lines:
        found = [number for number, line in enumerate(lines) if _names(json.loads(line), pattern)]
    if found:
        with source.open(encoding="utf-8") as lines, target.open("w", encoding="utf-8") as kept:
            kept.writelines(line for number, line in enumerate(lines) if number not in set(found))
    return len(found)


def names_of(ids: pa.Array) -> re.Pattern[str]:
    """Finds an id in a text where no letter, digit, `_` or `-` is beside it."""
    alternatives = "|".join(re.escape(one) for one in sorted(ids.to_pylist(), key=len, reverse=True))
    return re.compile(rf"(?<![\w-])(?:{alternatives})(?![\w-])")


def _names(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, dict):
        return any(_names(one, pattern) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return any(_names(one, pattern) for one in value)
    return isinstance(value, str) and pattern.search(value) is not None
