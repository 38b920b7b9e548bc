"""The proof: no file holds an id any more, in its decoded columns or in its bytes."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

MAX_RAW_BYTES = 64 << 20  # the bytes of a larger file, of weights, are not searched
MIN_RAW_CHARS = 6  # a shorter id, or a number, stands in any file by chance


@dataclass(frozen=True)
class Scan:
    """What a search for ids has found.

    Attributes:
        num_files: that were searched.
        num_raw: of them, those whose bytes were searched too.
        found: files that hold an id.
    """

    num_files: int
    num_raw: int
    found: tuple[Path, ...]


def scan(paths: Iterable[Path], ids: pa.Array) -> Scan:
    """Searches files for ids: every column of strings of Parquet with its statistics, every value of JSON, and bytes.

    Bytes are searched where a file is small and no Parquet, whose pages are compressed, for ids that cannot stand there
    by chance: of six characters or more, not of digits alone.

    Args:
        paths: of the files.
        ids: strings.
    """
    raw = _raw_pattern(ids)
    num_files, num_raw, found = 0, 0, list[Path]()
    for path in paths:
        num_files += 1
        is_small = raw is not None and path.suffix != ".parquet" and path.stat().st_size <= MAX_RAW_BYTES
        num_raw += is_small
        if _holds(path, ids) or (raw is not None and is_small and raw.search(path.read_bytes())):
            found.append(path)
    return Scan(num_files, num_raw, tuple(found))


def _holds(path: Path, ids: pa.Array) -> bool:
    if path.suffix == ".parquet":
        return _parquet_holds(path, ids)
    if path.suffix in (".json", ".jsonl"):
        text, wanted = path.read_text(encoding="utf-8"), set(ids.to_pylist())
        values = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
        return any(_json_holds(value, wanted) for value in values)
    return False


def _parquet_holds(path: Path, ids: pa.Array) -> bool:
    with pq.ParquetFile(path) as file:
        for column in range(file.metadata.num_columns):
            if file.schema.column(column).physical_type != "BYTE_ARRAY":
                continue
            name, wanted = file.schema.column(column).path, set(ids.to_pylist())
            for group in range(file.num_row_groups):
                bounds = file.metadata.row_group(group).column(column).statistics
                if bounds is not None and bounds.has_min_max and {bounds.min, bounds.max} & wanted:
                    return True
                for chunk in file.read_row_group(group, columns=[name]).columns[0].chunks:
                    if _array_holds(chunk, ids):
                        return True
    return False


def _array_holds(array: Any, ids: pa.Array) -> bool:
    """Whether strings at the leaves of a nested array are among the ids."""
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return bool(pc.any(pc.is_in(array.cast(pa.string()), value_set=ids)).as_py())
    if pa.types.is_map(kind):
        return _array_holds(array.keys, ids) or _array_holds(array.items, ids)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _array_holds(array.flatten(), ids)
    if pa.types.is_struct(kind):
        return any(_array_holds(field, ids) for field in array.flatten())
    return False


def _json_holds(value: Any, wanted: set[str]) -> bool:
    if isinstance(value, dict):
        return any(_json_holds(one, wanted) for pair in value.items() for one in pair)
    if isinstance(value, list):
        return any(_json_holds(one, wanted) for one in value)
    return isinstance(value, str) and value in wanted


def _raw_pattern(ids: pa.Array) -> re.Pattern[bytes] | None:
    distinct = [one.encode() for one in ids.to_pylist() if len(one) >= MIN_RAW_CHARS and not one.isdigit()]
    if not distinct:
        return None
    # Letters and digits beside it make it another id.
    return re.compile(rb"(?<![A-Za-z0-9_-])(?:" + b"|".join(map(re.escape, distinct)) + rb")(?![A-Za-z0-9_-])")
