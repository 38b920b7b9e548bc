"""Generic CSV and JSON-lines files with a mapping of columns."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from userrep.config import Config, ConfigError
from userrep.data.item_text import ALTERNATIVE, item_text, record_attributes, record_text
from userrep.data.sources.columns import TimeUnit
from userrep.data.sources.lines import Encoding, first_line, spans
from userrep.data.sources.records import parts_of, split_csv
from userrep.data.sources.source import Part, TableName
from userrep.data.sources.validate import Rules

JSON_ENDS = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}


class EventFiles(Config):
    """Where events are: a pattern of file names below the source's path, and the column (or JSON key) of each part."""

    files: str = "events.*"
    user_id: str = "user_id"
    item_id: str = "item_id"
    service: str | None = None  # None: every event is of the one service in `service_names`
    time: str | None = "timestamp"
    time_unit: TimeUnit = "s"
    position: str | None = None
    value: str | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns that every file must have."""
        named = (self.user_id, self.item_id, self.service, self.time, self.position, self.value)
        return tuple(name for name in named if name is not None)


class ItemFiles(Config):
    """Where items are. `text`: columns in order, alternatives by `|`; None: all but the id, in the file's order."""

    files: str = "items.*"
    item_id: str = "item_id"
    text: tuple[str, ...] | None = None
    keep_attributes: bool = False  # texts as attributes with keys (`data/item_text.py`), for models that read them

    def columns(self) -> tuple[str, ...]:
        """The columns that every file must have."""
        return (self.item_id, *(name for entry in self.text or () for name in entry.split(ALTERNATIVE)))


class UserFiles(Config):
    """Where users are. `labels`: the columns that are profile labels; None: all but the id."""

    files: str = "users.*"
    user_id: str = "user_id"
    labels: tuple[str, ...] | None = None

    def columns(self) -> tuple[str, ...]:
        """The columns that every file must have."""
        return (self.user_id, *(self.labels or ()))


class DelimitedSource(Config):
    """Files `.csv`, `.tsv`, `.jsonl` (also `.ndjson`, `.json`: one object per line), each also with `.gz`.

    One line is one record. In CSV the first line names the columns and `"` quotes; a line break inside quotes makes
    the line broken, so that a stray quote cannot swallow the good lines after it.
    """

    kind: Literal["delimited"] = "delimited"
    path: Path
    events: EventFiles = EventFiles()
    items: ItemFiles = ItemFiles()
    users: UserFiles | None = None
    service_names: tuple[str, ...] = Field(default=("event",), min_length=1)
    delimiter: str | None = Field(default=None, min_length=1, max_length=1)  # None: comma, in .tsv a tab
    encoding: Encoding = "utf-8"

    @model_validator(mode="after")
    def _one_service_without_column(self) -> Self:
        if self.events.service is None and len(self.service_names) != 1:
            raise ValueError(
                f"{len(self.service_names)} service_names but no events.service: name the column of services"
            )
        return self

    def services(self) -> list[str]:
        """The `service_names`, in the order given."""
        return list(self.service_names)

    def parts(self, table: TableName) -> list[Part]:
        """Spans of every file of the table; none for users when they are not configured.

        Raises:
            ConfigError: no file matches, a file has another ending, or its header lacks a column.
        """
        files = {"events": self.events, "items": self.items, "users": self.users}[table]
        if files is None:
            return []
        rules = Rules(self.service_names, self.events.time_unit)
        to_row = self._to_row(table)
        found: list[Part] = []
        for path in self._paths(table, files.files):
            end = Path(path.name.removesuffix(".gz")).suffix
            name = path.relative_to(self.path).as_posix()
            if end in JSON_ENDS:
                found += parts_of(spans(path, name), table, partial(_parse_json, to_row), rules, self.encoding)
                continue
            if end not in DELIMITERS:
                known = ", ".join((*DELIMITERS, *JSON_ENDS))
                raise ConfigError(f"{path} ends in {end!r}: known endings are {known}, each also with .gz")
            delimiter = self.delimiter or DELIMITERS[end]
            header = self._header(path, delimiter, files.columns())
            parse = partial(_parse_csv, to_row, delimiter, header)
            found += parts_of(spans(path, name), table, parse, rules, self.encoding, has_header=True)
        return found

    def _paths(self, table: TableName, pattern: str) -> list[Path]:
        paths = sorted(path for path in self.path.glob(pattern) if path.is_file())
        if not paths:
            raise ConfigError(f"no file {pattern!r} in {self.path}: set `{table}.files` to a pattern that matches")
        return paths

    def _header(self, path: Path, delimiter: str, needed: Sequence[str]) -> tuple[str, ...]:
        line = first_line(path, self.encoding)
        header = tuple(split_csv(line, delimiter, None))
        missing = [name for name in needed if name not in header]
        if missing or len(set(header)) != len(header):
            problem = f"lacks {missing}" if missing else "names a column twice"
            raise ConfigError(
                f"the header of {path} {problem}: its columns by delimiter {delimiter!r} are {list(header)}; "
                f"correct the header, the delimiter or the column mapping"
            )
        return header

    def _to_row(self, table: TableName) -> Callable[[Mapping[str, Any]], Sequence[object]]:
        if table == "events":
            return partial(_event, self.events, self.service_names[0])
        if table == "items":
            return partial(_item, self.items)
        assert self.users is not None  # parts() has returned before
        return partial(_user, self.users)


def _parse_json(to_row: Callable[[Mapping[str, Any]], Sequence[object]], line: str) -> Sequence[object]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("not an object")
    return to_row(record)


def _parse_csv(
    to_row: Callable[[Mapping[str, Any]], Sequence[object]], delimiter: str, header: tuple[str, ...], line: str
) -> Sequence[object]:
    return to_row(dict(zip(header, split_csv(line, delimiter, len(header)), strict=True)))


def _event(columns: EventFiles, service: str, record: Mapping[str, Any]) -> Sequence[object]:
    get = record.get
    return (
        get(columns.user_id),
        get(columns.item_id),
        service if columns.service is None else get(columns.service),
        None if columns.time is None else get(columns.time),
        None if columns.position is None else get(columns.position),
        None if columns.value is None else get(columns.value),
    )


def _item(columns: ItemFiles, record: Mapping[str, Any]) -> Sequence[object]:
    item_id = record.get(columns.item_id)
    if columns.text is None and not columns.keep_attributes:
        return item_id, item_text(value for name, value in record.items() if name != columns.item_id)
    names = columns.text or tuple(name for name in record if name != columns.item_id)
    return item_id, (record_attributes if columns.keep_attributes else record_text)(record, names)


def _user(columns: UserFiles, record: Mapping[str, Any]) -> Sequence[object]:
    names = [name for name in record if name != columns.user_id] if columns.labels is None else columns.labels
    return record.get(columns.user_id), {name: record.get(name) for name in names}
