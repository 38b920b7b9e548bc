"""Generic Parquet: a folder with an events, an items and possibly a users table."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from userrep.config import Config, ConfigError
from userrep.data.item_text import ALTERNATIVE, column_texts, default_text_columns, record_attributes
from userrep.data.sources.columns import TimeUnit, plain
from userrep.data.sources.parquet_file import Slice, check_columns, find_files, read_batches, slices
from userrep.data.sources.source import Parsed, Part, TableName
from userrep.data.sources.validate import MAX_RECORD_CHARS, Batch, Rules, check

USERS_FILE = "users.parquet"


class ParquetSource(Config):
    """A folder of Parquet tables; each table is a file or a folder of files.

    Events: user, item, service, value (null or NaN: none), time, position. Service, value and one of time and position
    may be absent. Items: id and text columns. Users: id, and labels in all other columns.
    """

    kind: Literal["parquet"] = "parquet"
    path: Path
    events: str = "events.parquet"
    items: str = "items.parquet"
    users: str | None = USERS_FILE  # the default may be absent; a name that you give may not
    user_id: str = "user_id"
    item_id: str = "item_id"
    service: str = "service"
    value: str = "value"
    time: str = "timestamp"
    position: str = "pos"
    time_unit: TimeUnit = "s"  # of a time column of numbers or strings
    default_service: str = "event"  # of every event, when there is no service column
    # None: the distinct values of the service column, sorted; finding them reads that column once
    service_names: tuple[str, ...] | None = Field(default=None, min_length=1)
    # Alternatives by `|`; None: all string and list-of-string columns but the item id and the service
    text_columns: tuple[str, ...] | None = Field(default=None, min_length=1)
    keep_attributes: bool = False  # texts as attributes with keys (`data/item_text.py`), for models that read them
    # None: all columns of users but the id
    label_columns: tuple[str, ...] | None = None

    def services(self) -> list[str]:
        """`service_names`, or what the service column holds, sorted, or the default service.

        Raises:
            ConfigError: no events file, or a file that is no Parquet.
        """
        if self.service_names is not None:
            return list(self.service_names)
        found: set[str] = set()
        for path in find_files(self.path, self.events, "events"):
            with pq.ParquetFile(path) as file:
                if self.service not in file.schema_arrow.names:
                    found.add(self.default_service)
                    continue
                for batch in file.iter_batches(columns=[self.service]):
                    found.update(text for text in plain(batch.column(0)).unique().to_pylist() if text and text.strip())
        return sorted(found)

    def parts(self, table: TableName) -> list[Part]:
        """Row groups of every file of the table, small ones together.

        Raises:
            ConfigError: a file is missing, is no Parquet, lacks a column, or has one of a type that cannot be used.
        """
        name = {"events": self.events, "items": self.items, "users": self.users}[table]
        if name is None or (name == USERS_FILE and table == "users" and not (self.path / name).exists()):
            return []
        rules = Rules(tuple(self.services()) if table == "events" else (), self.time_unit)
        found: list[Part] = []
        for path in find_files(self.path, name, table):
            schema = check_columns(path, *self._expected(table))
            roles = self._roles(table, path, schema)
            label = (path.relative_to(self.path) if path.is_relative_to(self.path) else path).as_posix()
            found += [partial(_read, part, table, roles, rules) for part in slices(path, label)]
        return found

    def _expected(self, table: TableName) -> tuple[dict[str, str], dict[str, str]]:
        """Columns that must be there and that may be, each with what it must hold."""
        if table == "users":
            return {self.user_id: "id"}, {}
        if table == "items":
            return {self.item_id: "id"}, {}
        optional = {self.service: "text", self.value: "number", self.time: "time", self.position: "number"}
        return {self.user_id: "id", self.item_id: "id"}, optional

    def _roles(self, table: TableName, path: Path, schema: pa.Schema) -> "_Roles":
        if table == "events":
            names = {"user_id": self.user_id, "item_id": self.item_id, "service": self.service}
            names |= {"value": self.value, "time": self.time, "position": self.position}
            names = {role: name for role, name in names.items() if name in schema.names}
            if not {"time", "position"} & set(names):
                raise ConfigError(
                    f"{path} has neither {self.time!r} nor {self.position!r}: the order of events is unknown; "
                    f"set `time` or `position` to one of its columns {schema.names}"
                )
            return _Roles(names, (), self.default_service, False)
        if table == "items":
            entries = self.text_columns
            if entries is None:
                entries = default_text_columns(schema, (self.item_id, self.service))
        else:
            entries = self.label_columns
            if entries is None:
                entries = tuple(name for name in schema.names if name != self.user_id)
        fields = tuple(tuple(entry.split(ALTERNATIVE)) if table == "items" else (entry,) for entry in entries)
        option = "text_columns" if table == "items" else "label_columns"
        unknown = [name for field in fields for name in field if name not in schema.names]
        nested = [name for (name, *_) in fields if table == "users" and pa.types.is_nested(schema.field(name).type)]
        if unknown or nested or (table == "items" and not fields):
            problem = f"has no {unknown}" if unknown else f"has nested {nested}" if nested else "has no text column"
            raise ConfigError(f"{path} {problem}: its columns are {schema.names}; set `{option}`")
        id_role = ("item_id", self.item_id) if table == "items" else ("user_id", self.user_id)
        return _Roles(dict([id_role]), fields, self.default_service, self.keep_attributes)


class _Roles(NamedTuple):
    """Which columns of a file are what."""

    columns: dict[str, str]  # role, as in validate.Batch -> column
    fields: tuple[tuple[str, ...], ...]  # text columns with their alternatives, or label columns
    default_service: str
    keep_attributes: bool


def _read(part: Slice, table: TableName, roles: _Roles, rules: Rules) -> Iterator[Parsed]:
    names = dict.fromkeys([*roles.columns.values(), *(name for field in roles.fields for name in field)])
    for first_row, rows in read_batches(part, list(names)):
        undecodable = np.zeros(rows.num_rows, bool)
        columns: dict[str, pa.Array] = {}
        for role, name in roles.columns.items():
            columns[role], is_bad = _valid_text(rows.column(name))
            undecodable |= is_bad
        lines = np.arange(first_row + 1, first_row + 1 + rows.num_rows)
        if table == "events" and "service" not in columns:
            columns["service"] = pa.repeat(pa.scalar(roles.default_service), rows.num_rows)
        elif table != "events":
            values: dict[str, list[object]] = {}
            for name in dict.fromkeys(name for field in roles.fields for name in field):
                values[name], is_bad = _python_values(rows.column(name), is_text=table == "users")
                undecodable |= is_bad
            if table == "items":
                columns["text"] = pa.array(_texts(values, roles), pa.string())
            else:
                columns["labels"] = _label_maps(values, rows.num_rows)
        yield check(table, Batch(part.name, lines, columns, partial(_record, rows), undecodable), rules)


def _texts(values: dict[str, list[object]], roles: _Roles) -> list[str]:
    if not roles.keep_attributes:
        return column_texts([[values[name] for name in field] for field in roles.fields])
    entries = [ALTERNATIVE.join(field) for field in roles.fields]
    return [
        record_attributes(dict(zip(values, row, strict=True)), entries) for row in zip(*values.values(), strict=True)
    ]


def _valid_text(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """A column whose values are all valid UTF-8, and which had to become null for that."""
    array = plain(array)
    bad = np.zeros(len(array), bool)
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        array = pa.array(array.to_pylist(), pa.binary()).view(pa.string())
    if not pa.types.is_string(array.type):
        return array, bad
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        values, bad = _python_values(array, is_text=False)
        array = pa.array(values, pa.string())
    return array, bad


def _python_values(array: pa.Array, is_text: bool) -> tuple[list[Any], np.ndarray]:
    """Values as Python objects, or with `is_text` as strings; and which hold bytes that are no UTF-8."""
    if is_text:
        array, bad = _valid_text(array)
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        return array.cast(pa.string()).to_pylist(), bad
    bad = np.zeros(len(array), bool)
    try:
        return array.to_pylist(), bad
    except UnicodeDecodeError:
        values: list[Any] = []
        for row, scalar in enumerate(array):
            values.append(None)
            try:
                values[-1] = scalar.as_py()
            except UnicodeDecodeError:
                bad[row] = True
        return values, bad


def _label_maps(values: dict[str, list[object]], num_rows: int) -> pa.Array:
    rows = zip(*values.values(), strict=True) if values else [()] * num_rows
    names = list(values)
    pairs = [[(name, value) for name, value in zip(names, row, strict=True) if value not in (None, "")] for row in rows]
    return pa.array(pairs, pa.map_(pa.string(), pa.string()))


def _record(rows: pa.RecordBatch, row: int) -> str:
    cells = {name: _cell(rows.column(name)[row]) for name in rows.schema.names}
    return json.dumps(cells, default=str, ensure_ascii=False)[:MAX_RECORD_CHARS]


def _cell(scalar: Any) -> object:
    try:
        return scalar.as_py()
    except ValueError:  # no UTF-8, or a time that Python cannot hold
        is_text = isinstance(scalar, pa.StringScalar | pa.LargeStringScalar)
        return scalar.as_buffer().to_pybytes().decode("utf-8", "backslashreplace") if is_text else repr(scalar.type)
