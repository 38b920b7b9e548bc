import pytest

from userrep.scaling.fit import Estimate
from userrep.scaling.wording import amount, cost, duration, fall, percent, place


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "512"), (2048, "2048"), (20_000, "20k"), (4.6e6, "4.6M"), (0.25, "0.25"), (1234.5, "1.23k")],
)
def test_amounts_are_short(value: float, text: str) -> None:
    assert amount(value) == text


def test_a_fall_turns_signs_and_ends_round() -> None:
    assert fall(Estimate("", -0.05, -0.06, 0.01)) == "4.9% (95% interval -1% to 5.8%)"
    assert percent(1e9).startswith("-")  # an end without bound is a number too


@pytest.mark.parametrize(("hours", "text"), [(12.34, "12.3 h"), (0.5, "30 min"), (0.002, "7.2 s")])
def test_durations_have_the_unit_that_fits(hours: float, text: str) -> None:
    assert duration(hours) == text
    assert cost(1e12, hours) == f"1e+12 FLOPs, {text}"


def test_a_place_has_its_factors_in_one_order() -> None:
    assert place({"B": 64.0, "N": 1e6}) == "N 1M, B 64"
    assert place({"C": 1.5e15}) == "C 1.5e+15"
    assert cost(2e15, None) == "2e+15 FLOPs"
