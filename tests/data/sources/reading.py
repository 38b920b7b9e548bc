"""Reads whole tables of a source, through pickled parts as another process would."""

import gzip
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa

from userrep.data.sources.source import Part, Source, TableName
from userrep.data.sources.validate import MAX_BATCH_ROWS
from userrep.schema import EVENTS, ITEMS, REJECTED, USERS

SCHEMAS = {"items": ITEMS, "events": EVENTS, "users": USERS}


def read_part(part: Part, table: TableName) -> tuple[pa.Table, pa.Table]:
    rows, rejected = [SCHEMAS[table].empty_table()], [REJECTED.empty_table()]
    for parsed in pickle.loads(pickle.dumps(part))():
        assert parsed.rows.schema.equals(SCHEMAS[table], check_metadata=True)
        assert parsed.rejected.schema.equals(REJECTED, check_metadata=True)
        assert parsed.rows.num_rows <= MAX_BATCH_ROWS
        parsed.rows.validate(full=True)
        parsed.rejected.validate(full=True)
        rows.append(parsed.rows)
        rejected.append(parsed.rejected)
    return pa.concat_tables(rows), pa.concat_tables(rejected)


def read_tables(source: Source, table: TableName) -> tuple[pa.Table, pa.Table]:
    read = [read_part(part, table) for part in source.parts(table)]
    rows = pa.concat_tables([SCHEMAS[table].empty_table(), *(rows for rows, _ in read)])
    return rows, pa.concat_tables([REJECTED.empty_table(), *(rejected for _, rejected in read)])


def read(source: Source, table: TableName) -> tuple[list[dict[str, Any]], list[tuple[str, int, str]]]:
    """Good rows, and (file, line, reason) of the rejected ones."""
    rows, rejected = read_tables(source, table)
    assert set(rejected["table"].to_pylist()) <= {table}
    faults = [(row["file"], row["line"], row["reason"]) for row in rejected.to_pylist()]
    return rows.to_pylist(), faults


def write(path: Path, content: str | bytes, encoding: str = "utf-8") -> Path:
    """Writes a file, compressed if its name ends in .gz."""
    data = content if isinstance(content, bytes) else content.encode(encoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path
