"""The rules that every record of every source must meet; what breaks one becomes a REJECTED row with its reason.

Unknown items and duplicates are not decided here: they need a whole table, which ingest has.
"""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userrep.data.sources.columns import TimeUnit, to_floats, to_ids, to_integers, to_seconds
from userrep.data.sources.source import Parsed, TableName
from userrep.schema import EVENTS, ITEMS, REJECTED, USERS

MAX_BATCH_ROWS = 65_536  # rows held at once by any source; bounds the memory of a part
MAX_RECORD_CHARS = 500

Reason = Literal[
    "bad_encoding",  # bytes (or surrogates) that are no text of the declared encoding
    "broken_line",  # no JSON object, wrong number of fields, unbalanced quote, or longer than lines.MAX_LINE_BYTES
    "missing_id",  # user or item id is null, blank, or neither a string nor an integer
    "unknown_service",  # service is null or none of the source's services
    "bad_time",  # no time of the declared unit, outside 1970..9999, or null where the position is null too
    "bad_position",  # no integer
    "bad_value",  # no number
    "non_finite_value",  # infinite, or too large for float32
    "empty_text",  # no text in any of the item's text columns
]


class Spoiled(NamedTuple):
    """A record that did not get as far as having columns."""

    line: int  # 1-based
    reason: Reason
    record: str
    id: str | None = None  # of an item or user record, where it can be read


class Batch(NamedTuple):
    """Records as read, before any rule.

    `columns` holds for items item_id and text; for users user_id and labels (a map); for events user_id, item_id,
    service and, where the data has them, time, position, value.
    """

    file: str
    lines: np.ndarray  # int64 (rows,), 1-based
    columns: Mapping[str, pa.Array]
    record: Callable[[int], str]  # row -> its record as read; asked for rejected rows only
    undecodable: np.ndarray | None = None  # bool (rows,): bad_encoding
    spoiled: Sequence[Spoiled] = ()  # further records of the same stretch of the file, sorted by line


class Rules(NamedTuple):
    """What the records of one source are checked against."""

    services: tuple[str, ...]
    time_unit: TimeUnit = "s"


def check(table: TableName, batch: Batch, rules: Rules) -> Parsed:
    """Splits a batch into rows of the table's schema and rejected records; a record with several faults names one."""
    if table == "events":
        return _check_events(batch, rules)
    id_column = "item_id" if table == "items" else "user_id"
    ids = to_ids(batch.columns[id_column])
    faults: list[tuple[Reason, np.ndarray]] = [("missing_id", _is_null(ids))]
    if table == "users":
        return _divide("users", USERS, batch, [ids, batch.columns["labels"]], faults)
    texts = batch.columns["text"]
    faults.append(("empty_text", _mask(pc.equal(pc.fill_null(texts, ""), ""))))
    return _divide("items", ITEMS, batch, [ids, texts], faults)


def rejected_table(table: TableName, file: str, spoiled: Sequence[Spoiled]) -> pa.Table:
    """REJECTED rows, each record cut at 500 characters and made valid UTF-8."""
    records = [entry.record[:MAX_RECORD_CHARS].encode("utf-8", "backslashreplace").decode() for entry in spoiled]
    columns = [
        pa.repeat(pa.scalar(table, pa.string()), len(spoiled)),
        pa.repeat(pa.scalar(file, pa.string()), len(spoiled)),
        pa.array([entry.line for entry in spoiled], pa.int64()),
        pa.array([entry.id for entry in spoiled], pa.string()),
        pa.array([entry.reason for entry in spoiled], pa.string()),
        pa.array(records, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=REJECTED)


def _check_events(batch: Batch, rules: Rules) -> Parsed:
    columns, rows = batch.columns, len(batch.lines)
    absent = pa.nulls(rows)
    user_ids, item_ids = to_ids(columns["user_id"]), to_ids(columns["item_id"])
    services = columns["service"].cast(pa.string())
    time = to_seconds(columns.get("time", absent), rules.time_unit)
    position = to_integers(columns.get("position", absent))
    value, is_infinite = to_floats(columns.get("value", absent))
    is_unordered = _is_null(time.values) & _is_null(position.values)
    is_known = pc.is_in(services, value_set=pa.array(rules.services, pa.string()))
    # In order of precedence: an unreadable position comes before the missing order that it causes.
    faults: list[tuple[Reason, np.ndarray]] = [
        ("missing_id", _is_null(user_ids) | _is_null(item_ids)),
        ("unknown_service", ~_mask(is_known)),
        ("bad_position", position.bad),
        ("bad_time", time.bad | is_unordered),
        ("bad_value", value.bad),
        ("non_finite_value", is_infinite),
    ]
    arrays = [user_ids, item_ids, services, time.values, position.values, value.values]
    return _divide("events", EVENTS, batch, arrays, faults)


def _divide(
    table: TableName, schema: pa.Schema, batch: Batch, arrays: list[pa.Array], faults: list[tuple[Reason, np.ndarray]]
) -> Parsed:
    rows = len(batch.lines)
    if batch.undecodable is not None:
        faults = [("bad_encoding", batch.undecodable), *faults]
    first_fault = np.zeros(rows, np.int8)  # 0: none; otherwise 1 + index into faults
    for index in reversed(range(len(faults))):
        first_fault[faults[index][1]] = index + 1
    files = pa.repeat(pa.scalar(batch.file, pa.string()), rows)
    good = pa.Table.from_arrays([*arrays, files, pa.array(batch.lines, pa.int64())], schema=schema)
    bad_rows = np.flatnonzero(first_fault)
    if bad_rows.size:
        good = good.filter(pa.array(first_fault == 0))
    ids = arrays[0] if table != "events" else pa.nulls(rows, pa.string())
    spoiled = [
        Spoiled(int(batch.lines[row]), faults[first_fault[row] - 1][0], batch.record(int(row)), ids[int(row)].as_py())
        for row in bad_rows
    ]
    spoiled = sorted([*batch.spoiled, *spoiled], key=lambda entry: entry.line)
    return Parsed(good, rejected_table(table, batch.file, spoiled))


def _is_null(array: pa.Array) -> np.ndarray:
    return _mask(array.is_null())


def _mask(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)
