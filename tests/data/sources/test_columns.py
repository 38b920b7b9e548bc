from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userrep.data.sources.columns import MAX_TIME, TimeUnit, to_floats, to_ids, to_integers, to_seconds

# A busy machine is no failure.
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def read_seconds(values: pa.Array, unit: TimeUnit) -> list[object]:
    """Seconds, None where missing, "bad" where unusable."""
    column = to_seconds(values, unit)
    pairs = zip(column.values.to_pylist(), column.bad, strict=True)
    assert all(number is None for number, bad in zip(column.values.to_pylist(), column.bad, strict=True) if bad)
    return ["bad" if bad else number for number, bad in pairs]


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_string_ids_stay_as_they_are(type_: pa.DataType):
    ids = pa.array([" a", "A00\t", "", "  ", None, "0012", "\xe9"], pa.string()).cast(type_)
    assert to_ids(ids).to_pylist() == [" a", "A00\t", None, None, None, "0012", "\xe9"]


def test_integer_ids_are_written_in_decimal():
    assert to_ids(pa.array([0, -3, 2**63 - 1, None])).to_pylist() == ["0", "-3", "9223372036854775807", None]


@pytest.mark.parametrize(
    ("values", "unit", "expected"),
    [
        (["0", "978300760", " 5 ", "1.9", "1e3"], "s", [0, 978300760, 5, 1, 1000]),
        (["-1", "1546300800000", "soon", "1_0", "inf", "0x1"], "s", ["bad"] * 6),
        (["", "nan", "None", " NULL "], "s", [None] * 4),
        (["1546300800999", "999", "-1"], "ms", [1546300800, 0, "bad"]),
        (["2019-01-01", "2019-01-01T00:00:01", "2019-01-01 01:00:00+01:00", "2019-01-01T00:00:00.9Z"], "iso",
         [1546300800, 1546300801, 1546300800, 1546300800]),
        (["01/02/2019", "2019", "2019-13-01", "1546300800", "1969-12-31"], "iso", ["bad"] * 5),
        (["", None], "iso", [None, None]),
        ([1.5, float("nan"), float("inf"), -1.0, 1e30], "s", [1, None, "bad", "bad", "bad"]),
        ([1546300800123, None, -5], "ms", [1546300800, None, "bad"]),
        ([None, None], "s", [None, None]),
        ([MAX_TIME, MAX_TIME + 1], "s", [MAX_TIME, "bad"]),
        ([Decimal("12.0"), None], "s", [12, None]),
    ],
)  # fmt: skip
def test_times(values: list[object], unit: TimeUnit, expected: list[object]):
    assert read_seconds(pa.array(values), unit) == expected


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "+05:00"])
def test_arrow_timestamps_need_no_unit(unit: str, zone: str | None):
    moment = datetime(2019, 1, 1, 0, 0, 5, tzinfo=UTC if zone else None)
    assert read_seconds(pa.array([moment, None], pa.timestamp(unit, zone)), "ms") == [1546300805, None]


def test_dates_are_midnight():
    assert read_seconds(pa.array([17897], pa.date32()), "s") == [1546300800]


@UNTIMED
@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.none(), min_size=1))
def test_no_integer_changes_on_its_way(numbers: list[int | None]):
    as_text = pa.array([None if number is None else str(number) for number in numbers], pa.string())
    for array in (pa.array(numbers, pa.int64()), as_text):
        column = to_integers(array)
        assert column.values.to_pylist() == numbers
        assert not column.bad.any()


def test_integers_that_are_none():
    column = to_integers(pa.array(["1.0", "1.5", "x", str(2**63), "", None]))
    assert column.values.to_pylist() == [1, None, None, None, None, None]
    assert column.bad.tolist() == [False, True, True, True, False, False]
    assert to_integers(pa.array([2**63, 3], pa.uint64())).bad.tolist() == [True, False]
    assert to_integers(pa.array([0.5, 2.0, float("nan")])).bad.tolist() == [True, False, False]


@UNTIMED
@given(st.lists(st.floats(width=32, allow_infinity=False)))
def test_floats_round_trip(numbers: list[float]):
    expected = [None if np.isnan(number) else number for number in numbers]
    for array in (pa.array(numbers, pa.float32()), pa.array([repr(number) for number in numbers], pa.string())):
        column, is_infinite = to_floats(array)
        assert column.values.to_pylist() == expected
        assert not is_infinite.any()
        assert not column.bad.any()


def test_floats_that_are_none():
    column, is_infinite = to_floats(
        pa.array(["inf", "-Infinity", "1e39", "five", "1_0", "", "NaN", None, "-0.5", " 3"])
    )
    assert is_infinite.tolist() == [True] * 3 + [False] * 7
    assert column.bad.tolist() == [False] * 3 + [True] * 2 + [False] * 5
    assert column.values.to_pylist() == [None] * 8 + [-0.5, 3.0]
