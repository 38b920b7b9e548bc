"""Raw columns of any reasonable type to the types of the tables; what cannot be read is marked, never guessed."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from datetime import UTC, datetime
from math import floor, isinf, isnan
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

TimeUnit = Literal["s", "ms", "iso"]
# A time outside 1970..9999 is a sentinel (-1) or the wrong unit (milliseconds as seconds: year 40,000).
MIN_TIME, MAX_TIME = 0, 253_402_300_799
_MISSING_WORDS = frozenset({"", "nan", "null", "none"})
_PLAIN_INTEGER = r"^-?[0-9]{1,18}$"  # always fits an int64


class Column(NamedTuple):
    """A column after conversion."""

    values: pa.Array  # null where missing or unusable
    bad: np.ndarray  # bool: a value was present but cannot be used


def to_ids(array: pa.Array) -> pa.Array:
    """Ids as strings, unchanged except that blank ones become null. Integers are written in decimal."""
    texts = plain(array).cast(pa.string())
    is_blank = pc.equal(pc.utf8_trim_whitespace(texts), "")
    return pc.if_else(pc.fill_null(is_blank, False), pa.scalar(None, pa.string()), texts)


def to_seconds(array: pa.Array, unit: TimeUnit) -> Column:
    """Times as int64 unix seconds, fractions of a second dropped.

    Args:
        array: Arrow timestamps or dates (`unit` is not used; without a zone they are UTC), numbers, or strings.
        unit: what numbers, and numbers in strings, count; `iso` reads ISO 8601 strings, without a zone as UTC.
    """
    array = plain(array)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        seconds = array.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        return _within_range(seconds, np.zeros(len(array), bool))
    if unit == "iso":
        return _within_range(*_iso_seconds(array))
    column = to_integers(array, is_floored=True)
    if unit == "ms":
        # Integer division, then back off by one where the remainder was negative: floor, exact for any int64.
        thousandth = pc.divide(column.values, 1000)
        is_below = pc.less(column.values, pc.multiply(thousandth, 1000))
        return _within_range(pc.subtract(thousandth, pc.cast(is_below, pa.int64())), column.bad)
    return _within_range(column.values, column.bad)


def to_integers(array: pa.Array, is_floored: bool = False) -> Column:
    """Numbers as int64; a fraction is floored or, without `is_floored`, bad. NaN and null-like words are missing."""
    array = plain(array)
    if pa.types.is_null(array.type):
        return Column(array.cast(pa.int64()), np.zeros(len(array), bool))
    if pa.types.is_uint64(array.type):
        bad = pc.fill_null(pc.greater(array, pa.scalar(2**63 - 1, pa.uint64())), False).to_numpy(zero_copy_only=False)
        return Column(_hidden(array, bad).cast(pa.int64()), bad)
    if pa.types.is_integer(array.type):
        return Column(array.cast(pa.int64()), np.zeros(len(array), bool))
    if pa.types.is_floating(array.type):
        return _floats_to_integers(array, is_floored)
    if pc.all(pc.match_substring_regex(array, _PLAIN_INTEGER), min_count=0).as_py():
        return Column(array.cast(pa.int64()), np.zeros(len(array), bool))
    parsed = [_integer(text, is_floored) for text in array.to_pylist()]
    bad = np.array([number is False for number in parsed], bool)
    return Column(pa.array([None if number is False else number for number in parsed], pa.int64()), bad)


def to_floats(array: pa.Array) -> tuple[Column, np.ndarray]:
    """Numbers as float32, NaN as null; and a mask of those that are infinite, or too large for float32."""
    array = plain(array)
    bad = np.zeros(len(array), bool)
    if pa.types.is_string(array.type):
        parsed = [_float(text) for text in array.to_pylist()]
        bad = np.array([number is None for number in parsed], bool)
        wide = np.array([np.nan if number is None else number for number in parsed], np.float64)
    else:
        wide = array.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    is_infinite = np.abs(wide) > np.finfo(np.float32).max
    values = np.where(is_infinite, np.nan, wide).astype(np.float32)
    return Column(pa.array(values, mask=np.isnan(values)), bad), is_infinite


def plain(array: pa.Array) -> pa.Array:
    """The column without dictionary encoding, large or view layout, or decimals."""
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        return array.cast(pa.string())
    if pa.types.is_decimal(array.type) or pa.types.is_float16(array.type):
        return array.cast(pa.float64(), safe=False)
    return array


def _within_range(seconds: pa.Array, bad: np.ndarray) -> Column:
    is_inside = pc.and_(pc.greater_equal(seconds, MIN_TIME), pc.less_equal(seconds, MAX_TIME))
    outside = ~pc.fill_null(is_inside, True).to_numpy(zero_copy_only=False)
    return Column(_hidden(seconds, outside) if outside.any() else seconds, bad | outside)


def _hidden(array: pa.Array, mask: np.ndarray) -> pa.Array:
    return pc.if_else(pa.array(mask), pa.scalar(None, array.type), array)


def _floats_to_integers(array: pa.Array, is_floored: bool) -> Column:
    wide = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    whole = np.floor(wide)
    is_missing = np.isnan(wide)
    bad = ~is_missing & ((np.abs(wide) >= 2**63) | ((whole != wide) & (not is_floored)))
    hidden = is_missing | bad
    return Column(pa.array(np.where(hidden, 0, whole).astype(np.int64), mask=hidden), bad)


def _iso_seconds(array: pa.Array) -> tuple[pa.Array, np.ndarray]:
    seconds: list[int | None] = []
    bad = np.zeros(len(array), bool)
    for row, text in enumerate(array.cast(pa.string()).to_pylist()):
        seconds.append(None)
        if text is None or text.strip().lower() in _MISSING_WORDS:
            continue
        try:
            moment = datetime.fromisoformat(text.strip())
            moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
            seconds[-1] = floor(moment.timestamp())
        except (ValueError, OverflowError):
            bad[row] = True
    return pa.array(seconds, pa.int64()), bad


def _integer(text: str | None, is_floored: bool) -> int | bool | None:
    """The number; None when missing; False when it is none."""
    if text is None or text.strip().lower() in _MISSING_WORDS:
        return None
    try:
        number = int(text)
    except ValueError:
        wide = _float(text)
        if wide is None or isnan(wide) or isinf(wide) or (wide != floor(wide) and not is_floored):
            return False
        number = floor(wide)
    # int() and float() read the digit separators of source code, which no data file means.
    return number if -(2**63) <= number < 2**63 and "_" not in text else False


def _float(text: str | None) -> float | None:
    """The number; NaN when missing; None when it is none."""
    if text is None or text.strip().lower() in _MISSING_WORDS:
        return float("nan")
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None
