import math
from dataclasses import replace

import numpy as np
import pytest

from userrep.scaling.broken import BrokenPowerLaw
from userrep.scaling.cells import Cells
from userrep.scaling.fit import fit_law, fit_point
from userrep.scaling.forecast import compare_forms, forecast_largest, residual_table
from userrep.scaling.forms import Form, PowerLaw

ONE, PURE, BROKEN = PowerLaw(("C",)), PowerLaw(("C",), has_floor=False), BrokenPowerLaw("C")


def make_cells(law: str, noise: float = 0.003, num_cells: int = 14) -> Cells:
    rng = np.random.default_rng(0)
    c = rng.permutation(np.logspace(12, 16, num_cells))
    x = c / 1e12
    loss = {
        "floor": 0.6 + 2 * x**-0.35,
        "pure": 3 * x**-0.15,
        "broken": 3 * x**-0.05 * np.where(x < 100, 1.0, (x / 100) ** -0.25),
    }[law]
    return Cells({"C": c}, loss * np.exp(noise * rng.standard_normal(num_cells)))


def test_the_largest_cells_are_forecast_without_being_seen() -> None:
    cells = make_cells("floor")
    fit, forecasts = forecast_largest(ONE, cells, 3, num_resamples=300)
    largest = np.sort(cells.factors["C"])[-3:]
    assert [one.factors["C"] for one in forecasts] == largest.tolist()
    assert len(fit.cells) == 11
    assert fit.cells.factors["C"].max() < largest[0]
    for one in forecasts:
        assert cells.factors["C"][one.cell] == one.factors["C"]
        assert one.measured == cells.loss[one.cell]
        assert one.low < one.predicted < one.high
        assert one.is_inside
    spoilt = replace(cells, loss=cells.loss * np.where(cells.factors["C"] == largest[-1], 1.2, 1.0))
    again = forecast_largest(ONE, spoilt, 3, num_resamples=300)[1]
    assert [one.predicted for one in again] == [one.predicted for one in forecasts]
    assert [one.is_inside for one in again] == [True, True, False]
    assert again[-1].log_error == pytest.approx(forecasts[-1].log_error + math.log(1.2))


def test_a_forecast_holds_out_something() -> None:
    with pytest.raises(ValueError, match="num_held is 0"):
        forecast_largest(ONE, make_cells("floor"), 0)


@pytest.mark.parametrize(("law", "best"), [("floor", ONE), ("pure", PURE), ("broken", BROKEN)])
def test_the_form_of_the_truth_forecasts_best(law: str, best: Form) -> None:
    cells = make_cells(law)
    found = compare_forms([ONE, PURE, BROKEN], cells)
    assert {one.form for one in found} == {ONE, PURE, BROKEN}
    errors = {one.form: one for one in found}
    # A form that contains the truth may come as close, never a form that does not.
    wrong = {"floor": [PURE], "pure": [], "broken": [ONE, PURE]}[law]
    for form in wrong:
        assert errors[form].largest_error > 2 * errors[best].largest_error
        assert errors[form].fold_error > 2 * errors[best].fold_error
    assert errors[best].largest_error < 0.02
    assert [one.largest_error for one in found] == sorted(one.largest_error for one in found)


def test_errors_are_those_of_cells_left_out_one_fold_after_another() -> None:
    cells = make_cells("floor", noise=0.02, num_cells=12)
    (found,) = compare_forms([ONE], cells)
    order = sorted(range(12), key=lambda cell: cells.factors["C"][cell])

    def errors(held: list[int]) -> list[float]:
        seen = [cell for cell in range(12) if cell not in held]
        centre, theta = fit_point(ONE, cells.take(np.array(seen)))
        floor, a, alpha = math.exp(theta[0]), math.exp(theta[1]), theta[2]
        predicted = [floor + a * math.exp(-alpha * (math.log(cells.factors["C"][i]) - centre[0])) for i in held]
        return [math.log(cells.loss[i] / one) for i, one in zip(held, predicted, strict=True)]

    folds = [error for fold in range(5) for error in errors(order[fold::5])]
    assert len(folds) == 12
    assert found.fold_error == pytest.approx(math.sqrt(sum(error**2 for error in folds) / 12))
    largest = errors(order[-2:])  # a fifth of twelve
    assert found.largest_error == pytest.approx(math.sqrt(sum(error**2 for error in largest) / 2))
    assert found.seen_error < found.fold_error


def test_a_form_that_too_few_cells_determine_comes_last_with_the_reason() -> None:
    cells = make_cells("pure", num_cells=6)
    found = compare_forms([BROKEN, PURE], cells)
    assert [one.form for one in found] == [PURE, BROKEN]
    assert found[0].refusal is None
    assert "4 parameters" in (found[1].refusal or "")
    assert found[1].largest_error == math.inf


def test_the_worst_cell_heads_the_residuals() -> None:
    cells = make_cells("floor")
    spoilt = replace(cells, loss=cells.loss * np.where(np.arange(14) == 5, 0.9, 1.0))
    fit = fit_law(ONE, spoilt, num_resamples=50)
    table = residual_table(fit)
    assert sorted(one.cell for one in table) == list(range(14))
    assert table[0].cell == 5
    assert table[0].log_residual == pytest.approx(math.log(0.9), abs=0.02)
    for one in table:
        assert one.measured == spoilt.loss[one.cell]
        assert one.factors == {"C": cells.factors["C"][one.cell]}
        assert one.log_residual == pytest.approx(math.log(one.measured / one.fitted))
        assert abs(one.standardised) >= abs(one.log_residual) / fit.noise - 1e-12
