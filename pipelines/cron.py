"""Cron expressions that mean the same to cron, to Kubernetes and to KubeRay; everything else is refused.

Five fields: minute, hour, day of month, month, day of week. The readers disagree on more than they document: 7 for
Sunday, `?`, `5/10`, macros and seconds are understood by some of them only, so none of these is taken.
"""

import itertools
from dataclasses import dataclass
from datetime import date, timedelta

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
# After 28 years days of week and leap years repeat, so every expression has shown all its gaps.
_ALL_DAYS = tuple(date(2000, 1, 1) + timedelta(days=n) for n in range(28 * 365 + 7))


@dataclass(frozen=True)
class Field:
    """One field: its name, smallest and largest value, and names of values, the first one for the smallest."""

    name: str
    low: int
    high: int
    names: tuple[str, ...] = ()

    def describe(self) -> str:
        """What is allowed, for messages."""
        names = f" or {self.names[0]}-{self.names[-1]}" if self.names else ""
        return f"{self.low}-{self.high}{names}, `*`, lists a,b, ranges a-b, steps */n and a-b/n"


FIELDS = (
    Field("minute", 0, 59),
    Field("hour", 0, 23),
    Field("day of month", 1, 31),
    Field("month", 1, 12, MONTHS),
    Field("day of week", 0, 6, DAYS),
)


@dataclass(frozen=True)
class CronExpression:
    """A parsed expression.

    Attributes:
        text: its fields, separated by one space.
        minutes, hours, days, months, weekdays: values of the fields, 0..59, 0..23, 1..31, 1..12, 0..6 (0 is Sunday).
        is_either: days and weekdays are both restricted, and then a day that is in one of them is enough.
    """

    text: str
    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    is_either: bool

    def fires_on(self, day: date) -> bool:
        """Whether it fires on this day."""
        in_days, in_weekdays = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        is_day = in_days or in_weekdays if self.is_either else in_days and in_weekdays
        return day.month in self.months and is_day

    @property
    def times_per_day(self) -> int:
        """How often it fires on a day on which it does."""
        return len(self.minutes) * len(self.hours)

    @property
    def shortest_gap_days(self) -> int:
        """Fewest days from one day on which it fires to the next."""
        fired = [day.toordinal() for day in _ALL_DAYS if self.fires_on(day)]
        return min(b - a for a, b in itertools.pairwise(fired))


def parse_cron(text: str) -> CronExpression:
    """Reads an expression.

    Raises:
        ValueError: not five fields, a value that a field has not, a form that not every cron reads alike, or days
            that no year has.
    """
    words = text.lower().split()
    if len(words) != len(FIELDS):
        raise ValueError(
            f"cron expression {text!r} has {len(words)} fields; it needs five: minute, hour, day of month, month, day "
            "of week, e.g. '0 3 * * 1' for Mondays at 3:00 (macros as @weekly and seconds are not read everywhere)"
        )
    values = [_values(word, field) for word, field in zip(words, FIELDS, strict=True)]
    every_other = [word.startswith("*/") for word in (words[2], words[4])]
    is_free = [word == "*" for word in (words[2], words[4])]
    if any(every_other) and not any(is_free):
        raise ValueError(
            f"cron expression {text!r}: a step */n in day of month or day of week beside a restriction of the other "
            "is a union to Kubernetes and an intersection to cron; write the days as a list"
        )
    found = CronExpression(" ".join(words), *values, is_either=not any(is_free))
    if not any(map(found.fires_on, _ALL_DAYS)):
        raise ValueError(f"cron expression {text!r} never fires: no year has such a day; check day of month and month")
    return found


def _values(word: str, field: Field) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        span, has_step, step_text = part.partition("/")
        first, is_range, last = span.partition("-")
        if has_step and not (span == "*" or is_range):
            raise _refusal(part, field)
        step = _number(step_text, part, field) if has_step else 1
        low = field.low if span == "*" else _value(first, part, field)
        high = field.high if span == "*" else _value(last, part, field) if is_range else low
        if step < 1 or low > high:
            raise _refusal(part, field)
        found.update(range(low, high + 1, step))
    return frozenset(found)


def _value(text: str, part: str, field: Field) -> int:
    value = field.names.index(text) + field.low if text in field.names else _number(text, part, field)
    if not field.low <= value <= field.high:
        raise _refusal(part, field)
    return value


def _number(text: str, part: str, field: Field) -> int:
    if not (text.isascii() and text.isdigit()):
        raise _refusal(part, field)
    return int(text)


def _refusal(part: str, field: Field) -> ValueError:
    sunday = "; Sunday is 0" if field.names is DAYS and part == "7" else ""
    return ValueError(f"cron field {field.name!r}: received {part!r}, allowed: {field.describe()}{sunday}")
