from dataclasses import replace

import pytest

from tests.support.runs_table import star_laws, star_runs, take
from userrep.scaling.answers import UNKNOWN, Answer, answer_questions, difference
from userrep.scaling.fit import Estimate
from userrep.scaling.laws import fit_laws
from userrep.scaling.records import Laws
from userrep.scaling.wording import fall


def answer(laws: Laws, words: str) -> Answer:
    [found] = [one for one in answer_questions(laws) if words in one.question]
    assert found.is_answered == (not found.text.startswith(UNKNOWN))
    return found


def test_the_better_use_of_compute_is_ranked_with_intervals() -> None:
    text = answer(star_laws(), "better use").text
    order = [text.index(name) for name in ("spent on", "model size lowers", "history length lowers", "batch size")]
    assert order == sorted(order)
    doubling = star_laws().law("L(N)").doubling
    assert doubling is not None
    assert doubling.compute_change is not None
    assert f"model size lowers the loss by {fall(doubling.compute_change)}" in text
    assert "The sweep does not separate" in text  # model and samples were planted nearly alike
    assert "Twice the batch size, which costs nearly no compute" in text


def test_a_clear_winner_is_named() -> None:
    laws = star_laws()
    better = Estimate("", -0.2, -0.21, -0.19)
    samples = laws.law("L(D)")
    assert samples.doubling is not None
    samples = replace(samples, doubling=replace(samples.doubling, compute_change=better))
    laws = replace(laws, laws=tuple(samples if law.name == "L(D)" else law for law in laws.laws))
    assert "The best use is samples." in answer(laws, "better use").text


def test_a_larger_model_at_small_batch_is_said_only_where_models_differ_there() -> None:
    assert "the smallest batch is 32: run two models there" in answer(star_laws(), "small batch").text
    small = [place for place in star_laws().places if place.factors["B"] == 32]
    for loss, verdict in ((small[0].loss, "does not clearly help"), (0.8 * small[0].loss, "helps")):
        larger = replace(small[0], cell_id="larger", loss=loss, factors=small[0].factors | {"N": 5e6})
        text = answer(replace(star_laws(), places=(*star_laws().places, larger)), "small batch").text
        assert f"So a larger model {verdict} at small batch." in text
        assert "at batch 512 by" in text
    one_batch = tuple(place for place in star_laws().places if place.factors["B"] == 512)
    assert "all cells have the batch 512" in answer(replace(star_laws(), places=one_batch), "small batch").text


def test_downstream_and_recall_follow_the_loss() -> None:
    assert "gender: yes, rank correlation 0.9" in answer(star_laws(), "downstream loss").text
    assert "next_item: yes, rank correlation -1.00" in answer(star_laws(), "downstream scores").text
    assert "recall_at_10: yes, rank correlation -1.00" in answer(star_laws(), "recall").text
    against = tuple(
        replace(one, value=Estimate("", 0.9, 0.8, 0.95)) if one.measure == "recall_at_10" else one
        for one in star_laws().correlations
    )
    text = answer(replace(star_laws(), correlations=against), "recall").text
    assert "recall_at_10: no, the other way round" in text


@pytest.mark.parametrize("num_finished", [0, 3])
def test_nothing_is_answered_by_too_few_cells(num_finished: int) -> None:
    laws = fit_laws(take(star_runs(), num_finished), num_resamples=50)
    assert not any(one.is_answered for one in answer_questions(laws))
    assert all(one.text.startswith(UNKNOWN) for one in answer_questions(laws))


def test_compute_is_divided_as_the_joint_law_says() -> None:
    share = star_laws().law("L(N, D)").with_floor.estimate("compute_exponent_N")
    assert share is not None
    assert f"power {share.value:.3g} (95% interval" in answer(star_laws(), "divided").text
    assert "L(N, D) forecasts 3 of 3 within the interval." in answer(star_laws(), "divided").text


def test_a_difference_has_the_widths_of_both() -> None:
    found = difference(Estimate("a", 5, 2, 9), Estimate("b", 1, -3, 4))
    assert (found.value, found.low, found.high) == (4, pytest.approx(4 - 18**0.5), pytest.approx(4 + 32**0.5))
