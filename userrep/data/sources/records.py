"""Lines to checked tables: what the sources that read text files share."""

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from userrep.data.sources.lines import Encoding, Span, read_lines
from userrep.data.sources.source import Parsed, Part, TableName
from userrep.data.sources.validate import Batch, Rules, Spoiled, check

# What a line parser returns, in this order. Absent values are None; labels are a dict.
FIELDS: dict[TableName, tuple[str, ...]] = {
    "items": ("item_id", "text"),
    "users": ("user_id", "labels"),
    "events": ("user_id", "item_id", "service", "time", "position", "value"),
}
_NUMERIC = ("time", "position", "value")

# One line -> the values of FIELDS. Raises ValueError when the line is broken. Picklable.
LineParser = Callable[[str], Sequence[object]]


def parts_of(
    found: Sequence[Span],
    table: TableName,
    parse: LineParser,
    rules: Rules,
    encoding: Encoding,
    has_header: bool = False,
) -> list[Part]:
    """One part per span; with `has_header`, line 1 of a file is no record."""
    return [partial(read_records, span, table, parse, rules, encoding, has_header) for span in found]


def read_records(
    span: Span, table: TableName, parse: LineParser, rules: Rules, encoding: Encoding, has_header: bool = False
) -> Iterator[Parsed]:
    """Reads, parses and checks the lines of a span; a batch per block of lines."""
    for lines in read_lines(span, encoding):
        numbers: list[int] = []
        texts: list[str] = []
        rows: list[Sequence[object]] = []
        spoiled = list(lines.spoiled)
        for number, text in zip(lines.numbers, lines.texts, strict=True):
            if has_header and number == 1:
                continue
            try:
                rows.append(parse(text))
            # A literal nested a thousand brackets deep ends in the last two; SyntaxError is from Python literals.
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                spoiled.append(Spoiled(number, "broken_line", text))
            else:
                numbers.append(number)
                texts.append(text)
        yield check(table, _batch(span.name, table, numbers, texts, rows, spoiled), rules)


def split_csv(line: str, delimiter: str, num_fields: int | None) -> list[str]:
    """The fields of a CSV record that stands on one line.

    Raises:
        ValueError: unbalanced quotes, or not `num_fields` fields (None: any number will do).
    """
    if '"' in line:
        try:
            fields = next(csv.reader([line], delimiter=delimiter, strict=True))
        except csv.Error as error:
            raise ValueError(str(error)) from error
    else:
        fields = line.split(delimiter)
    if num_fields is not None and len(fields) != num_fields:
        raise ValueError(f"{len(fields)} fields instead of {num_fields}")
    return fields


def _batch(
    file: str,
    table: TableName,
    numbers: list[int],
    texts: list[str],
    rows: list[Sequence[object]],
    spoiled: list[Spoiled],
) -> Batch:
    undecodable = np.zeros(len(rows), bool)
    columns: dict[str, pa.Array] = {}
    for index, name in enumerate(FIELDS[table]):
        values = [row[index] for row in rows]
        if name in _NUMERIC:
            columns[name] = _numbers(values)
        else:
            columns[name], is_bad = _labels(values) if name == "labels" else _strings(values)
            undecodable |= is_bad
    return Batch(file, np.array(numbers, np.int64), columns, texts.__getitem__, undecodable, spoiled)


def _strings(values: list[object]) -> tuple[pa.Array, np.ndarray]:
    """Strings and integers as strings, anything else as null; and which hold a lone surrogate, which is no text."""
    texts = [value if type(value) is str else str(value) if type(value) is int else None for value in values]
    try:
        return pa.array(texts, pa.string()), np.zeros(len(texts), bool)
    except UnicodeEncodeError:
        bad = np.array([text is not None and not _is_encodable(text) for text in texts], bool)
        return pa.array([None if is_bad else text for text, is_bad in zip(texts, bad, strict=True)], pa.string()), bad


def _numbers(values: list[object]) -> pa.Array:
    """A numeric array where every value is a number, else strings, so that no integer passes through a float."""
    kinds = set(map(type, values)) - {type(None)}
    if not kinds:
        return pa.nulls(len(values))
    if kinds in ({int}, {float}):
        try:
            return pa.array(values)
        except OverflowError:
            pass  # an integer of more than 64 bits: as text it becomes a fault of its own row only
    texts = [None if value is None else str(value) for value in values]
    return pa.array([text if text is None or _is_encodable(text) else "?" for text in texts], pa.string())


def _labels(values: list[object]) -> tuple[pa.Array, np.ndarray]:
    maps = [
        [(name, str(value)) for name, value in labels.items() if value is not None and value != ""]
        for labels in values
        if isinstance(labels, dict)
    ]
    bad = np.array([not all(map(_is_encodable, (text for pair in pairs for text in pair))) for pairs in maps], bool)
    kept = [[] if is_bad else pairs for pairs, is_bad in zip(maps, bad, strict=True)]
    return pa.array(kept, pa.map_(pa.string(), pa.string())), bad


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
