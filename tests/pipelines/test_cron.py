"""Cron expressions: values by enumeration of days, and a clear refusal of what not every cron reads alike."""

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.cron import parse_cron


def test_a_weekday_fires_on_that_day_of_every_week() -> None:
    found = parse_cron(" 0  3 * * MON ")
    assert found.text == "0 3 * * mon"
    days = [date(2026, 1, 1) + timedelta(days=n) for n in range(365)]
    assert [day for day in days if found.fires_on(day)] == [day for day in days if day.strftime("%a") == "Mon"]
    assert (found.times_per_day, found.shortest_gap_days) == (1, 7)


@pytest.mark.parametrize(
    ("text", "gap"),
    [
        ("0 3 * * *", 1),
        ("0 3 1 * *", 28),
        ("0 3 1,15 * *", 14),
        ("0 3 29 feb *", 4 * 365 + 1),
        ("30 22 * * mon-fri", 1),
        ("0 3 1-31/10 * *", 1),  # 31st and 1st
        ("0 0 13 * fri", 1),  # a day in one of both is enough
        ("0 0 13 jan-mar/2 *", 59),
    ],
)
def test_shortest_gap(text: str, gap: int) -> None:
    assert parse_cron(text).shortest_gap_days == gap


@given(minutes=st.sets(st.integers(0, 59), min_size=1), hours=st.sets(st.integers(0, 23), min_size=1))
def test_lists_hold_exactly_their_values(minutes: set[int], hours: set[int]) -> None:
    found = parse_cron(f"{','.join(map(str, minutes))} {','.join(map(str, hours))} * * *")
    assert (found.minutes, found.hours) == (minutes, hours)
    assert found.times_per_day == len(minutes) * len(hours)


@given(low=st.integers(0, 59), high=st.integers(0, 59), step=st.integers(1, 70))
def test_ranges_with_steps(low: int, high: int, step: int) -> None:
    if low > high:
        with pytest.raises(ValueError, match="minute"):
            parse_cron(f"{low}-{high}/{step} 0 * * *")
    else:
        assert parse_cron(f"{low}-{high}/{step} 0 * * *").minutes == set(range(low, high + 1, step))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("@weekly", "has 1 fields; it needs five"),
        ("0 0 3 * * 1", "has 6 fields"),
        ("", "has 0 fields"),
        ("60 3 * * 1", "'minute': received '60', allowed: 0-59"),
        ("0 24 * * 1", "'hour': received '24'"),
        ("0 3 0 * *", "'day of month': received '0', allowed: 1-31"),
        ("0 3 * 13 *", "'month': received '13', allowed: 1-12 or jan-dec"),
        ("0 3 * * 7", "'day of week': received '7'.*Sunday is 0"),
        ("0 3 * * monday", "received 'monday', allowed: 0-6 or sun-sat"),
        ("0 3 * mon *", "'month': received 'mon'"),
        ("0 3 ? * 1", "received '?'"),
        ("5/10 3 * * *", "received '5/10'"),
        ("*/0 3 * * *", r"received '\*/0'"),
        ("1, 3 * * *", "received ''"),
        ("-5 3 * * *", "received '-5'"),
        ("1- 3 * * *", "received '1-'"),
        ("0 3 31 2,4 *", "never fires"),
        ("0 3 */2 * mon", "write the days as a list"),
        ("0 3 1 * */2", "write the days as a list"),
    ],
)
def test_refusals_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cron(text)
