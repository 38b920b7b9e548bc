"""Tabular item to text: what an item encoder reads in place of an item id.

A text has one of two forms. Plain: the values of all attributes as one line. Attributes: one line per attribute, its
key and its values separated by tabs, for models that read keys too. No value holds a tab or a newline, so a plain text
is also a text of attributes: one value without a key.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import isnan

import pyarrow as pa

Attribute = tuple[str, list[str]]  # key, "" where there is none; values

KEY_SEPARATOR, ATTRIBUTE_SEPARATOR = "\t", "\n"
ALTERNATIVE = "|"  # in a text column entry: `title|keywords` takes the first of the two that has text


def item_text(fields: Iterable[object]) -> str:
    """Joins the values of an item's attributes, in the order given, by single spaces.

    Lists (nested ones too) are joined, of a mapping the values; every run of whitespace becomes one space; None, NaN
    and empty values leave no trace. A space, not a comma, separates: it costs a tokenizer nothing.

    Args:
        fields: attribute values: strings, numbers, lists or mappings of them, None.

    Returns:
        One line, without whitespace at its ends; empty when no field has text.
    """
    words: list[str] = []
    for field in fields:
        _collect(field, words)
    return " ".join(words)


def record_text(record: Mapping[str, object], columns: Sequence[str]) -> str:
    """The item_text of a record.

    Args:
        record: attribute name -> value; names that are absent count as empty.
        columns: which attributes, in which order; an entry may name alternatives (`title|keywords`), of which the
            first with text is used.
    """
    chosen = (_first_text(record.get(name) for name in entry.split(ALTERNATIVE)) for entry in columns)
    return " ".join(text for text in chosen if text)


def record_attributes(record: Mapping[str, object], columns: Sequence[str]) -> str:
    """The attributes of a record as text; arguments as of `record_text`.

    The key of an attribute is its name in `columns`, of alternatives the first one. A list or mapping has one value per
    entry that has text. Attributes without text are left out.
    """
    attributes: list[Attribute] = []
    for entry in columns:
        names = entry.split(ALTERNATIVE)
        attributes.append((names[0], next(filter(None, (_values(record.get(name)) for name in names)), [])))
    return format_attributes(attributes)


def format_attributes(attributes: Iterable[Attribute]) -> str:
    """Text of attributes. Whitespace in keys and values becomes single spaces; what is empty then is left out."""
    lines = []
    for key, values in attributes:
        words = [text for text in (" ".join(value.split()) for value in values) if text]
        if words:
            lines.append(KEY_SEPARATOR.join((" ".join(key.split()), *words)))
    return ATTRIBUTE_SEPARATOR.join(lines)


def parse_attributes(text: str) -> list[Attribute]:
    """Inverse of `format_attributes`; a line without a tab is one value without a key."""
    attributes: list[Attribute] = []
    for line in text.split(ATTRIBUTE_SEPARATOR) if text else ():
        key, *values = line.split(KEY_SEPARATOR)
        attributes.append((key, values) if values else ("", [key]))
    return attributes


def plain_text(text: str) -> str:
    """A text of either form as one line without keys."""
    if KEY_SEPARATOR not in text:
        return text
    return " ".join(value for _, values in parse_attributes(text) for value in values)


def column_texts(fields: Sequence[Sequence[Sequence[object]]]) -> list[str]:
    """The item_text of many items held as columns.

    Args:
        fields: per field its alternatives, each a column with one value per item (at least one field).

    Returns:
        One text per item, equal to `record_text` of that item.
    """
    chosen = []
    for alternatives in fields:
        texts = [item_text((value,)) for value in alternatives[0]]
        for other in alternatives[1:]:
            texts = [text or item_text((value,)) for text, value in zip(texts, other, strict=True)]
        chosen.append(texts)
    if len(chosen) == 1:
        return chosen[0]
    return [" ".join(filter(None, texts)) for texts in zip(*chosen, strict=True)]


def default_text_columns(schema: pa.Schema, excluded: Iterable[str]) -> tuple[str, ...]:
    """Names of the string and list-of-string columns of a table in table order, less the `excluded` ones."""
    skipped = set(excluded)
    return tuple(field.name for field in schema if field.name not in skipped and _is_text(field.type))


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_dictionary(type_):
        return _is_text(type_.value_type)
    return pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)


def _values(field: object) -> list[str]:
    if isinstance(field, Mapping):
        field = list(field.values())
    entries = field if isinstance(field, Iterable) and not isinstance(field, str | bytes) else (field,)
    return [text for text in (item_text((value,)) for value in entries) if text]


def _first_text(values: Iterable[object]) -> str:
    for value in values:
        text = item_text((value,))
        if text:
            return text
    return ""


def _collect(field: object, words: list[str]) -> None:
    if isinstance(field, str):
        words.extend(field.split())
    elif field is None or (isinstance(field, float) and isnan(field)):
        return
    elif isinstance(field, Mapping):
        for value in field.values():
            _collect(value, words)
    elif isinstance(field, Iterable) and not isinstance(field, bytes):
        for value in field:
            _collect(value, words)
    else:
        words.extend(str(field).split())
