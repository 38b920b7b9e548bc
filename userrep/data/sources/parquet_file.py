"""Parquet files as slices of row groups that are read in bounded batches."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from userrep.config import ConfigError
from userrep.data.sources.source import TableName
from userrep.data.sources.validate import MAX_BATCH_ROWS

SLICE_ROWS = 262_144  # smaller row groups are read together; assumption: a task this small still outweighs its start
READ_BUFFER_BYTES = 1 << 20
_TYPES = {
    "id": "a string or integer",
    "text": "a string",
    "number": "a number or string",
    "time": "a timestamp, date, number or string",
}


class Slice(NamedTuple):
    """Consecutive row groups of one file.

    A row group is never divided: Parquet cannot skip into one, so each piece would decode all rows before it.
    """

    path: Path
    name: str  # how rows refer to the file
    row_groups: tuple[int, ...]
    first_row: int  # 0-based, in the file


def find_files(folder: Path, name: str, table: TableName) -> list[Path]:
    """The file of this name, or all `.parquet` files below the folder of this name, sorted.

    Raises:
        ConfigError: there is none, or one is no Parquet.
    """
    target = folder / name
    paths = sorted(target.rglob("*.parquet")) if target.is_dir() else [target]
    if not paths or not paths[0].is_file():
        raise ConfigError(f"no Parquet file {target}: set `path` and `{table}` to a file or a folder of .parquet files")
    for path in paths:
        try:
            pq.ParquetFile(path).close()
        except (pa.ArrowInvalid, OSError) as error:
            raise ConfigError(f"{path} is not a readable Parquet file: {error}") from error
    return paths


def check_columns(path: Path, required: Mapping[str, str], optional: Mapping[str, str]) -> pa.Schema:
    """The file's Arrow schema, once its columns have been found usable.

    Args:
        path: a Parquet file.
        required: column -> what it must hold: id, text, number or time.
        optional: the same for columns that may be absent.

    Raises:
        ConfigError: a required column is absent, or a column is of another type.
    """
    schema = pq.read_schema(path)
    for name, kind in {**optional, **required}.items():
        if name not in schema.names:
            if name in required:
                raise ConfigError(f"{path} has no column {name!r}: it has {schema.names}; set the column's name")
        elif not _holds(schema.field(name).type, kind):
            found = schema.field(name).type
            raise ConfigError(f"column {name!r} of {path} is of type {found}, not {kind}: cast it to {_TYPES[kind]}")
    return schema


def slices(path: Path, name: str) -> list[Slice]:
    """Divides a file into slices of about `SLICE_ROWS` rows, at least one row group each."""
    with pq.ParquetFile(path) as file:
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    found: list[Slice] = []
    groups: list[int] = []
    first_row = rows = 0
    for group, size in enumerate(sizes):
        if groups and rows + size > SLICE_ROWS:
            found.append(Slice(path, name, tuple(groups), first_row))
            groups, first_row, rows = [], first_row + rows, 0
        groups.append(group)
        rows += size
    if groups:
        found.append(Slice(path, name, tuple(groups), first_row))
    return found


def read_batches(part: Slice, columns: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yields (0-based row in the file, rows), at most `MAX_BATCH_ROWS` at a time.

    A row group of any size is streamed: neither its pages nor its rows are held as a whole.
    """
    row = part.first_row
    with pq.ParquetFile(part.path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False) as file:
        for batch in file.iter_batches(MAX_BATCH_ROWS, row_groups=list(part.row_groups), columns=columns):
            yield row, batch
            row += batch.num_rows


def _holds(type_: pa.DataType, kind: str) -> bool:
    types = pa.types
    if types.is_dictionary(type_):
        type_ = type_.value_type
    is_text = types.is_string(type_) or types.is_large_string(type_) or types.is_string_view(type_)
    is_number = types.is_integer(type_) or types.is_floating(type_) or types.is_decimal(type_) or types.is_null(type_)
    if kind == "text":
        return is_text
    if kind == "id":
        return is_text or types.is_integer(type_) or types.is_binary(type_) or types.is_large_binary(type_)
    if kind == "time":
        return is_text or is_number or types.is_timestamp(type_) or types.is_date(type_)
    return is_text or is_number
