"""One law of a sweep: both forms fitted, rival forms compared, the largest cells forecast, the next cell chosen.

What cannot be fitted is refused in the result; nothing here raises for a sweep that is too small.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from userrep.scaling.broken import BrokenPowerLaw
from userrep.scaling.cells import Cells
from userrep.scaling.fit import Estimate, Fit, fit_law
from userrep.scaling.forecast import HELD_SHARE, Comparison, Forecast, compare_forms, forecast_largest, residual_table
from userrep.scaling.forms import Form, PowerLaw
from userrep.scaling.pricing import PriceList, choose_next, elasticity
from userrep.scaling.records import BandPoint, Doubling, FormFit, FormScore, Law
from userrep.scaling.runs import Place

MIN_CELLS = 5  # of a power law with floor, which has three parameters: fewer leave one residual, which is no noise
MAX_HELD = 3  # cells that are held out together
BAND_POINTS = 48
BAND_MARGIN = 1.5  # of the band beyond the cells, as a factor
MIN_ELASTICITY = 0.1  # assumption: below, a factor of 2 in the factor is less than 7% of compute, and is called free
SMALL_STEP = 1.01  # a factor in compute over which a slope is taken
LARGEST_NUMBER = 1e300  # JSON has no infinity


@dataclass(frozen=True)
class Question:
    """A law that is to be fitted.

    Attributes:
        name: `L(N)`.
        factors: of the law.
        places: to fit; may be too few.
        has_compute: whether the range of compute decides on refusals too.
        held: factors that are the same at all places; empty for a law in C.
        refusal: why the design cannot answer; None where it may.
    """

    name: str
    factors: tuple[str, ...]
    places: tuple[Place, ...]
    has_compute: bool
    held: Mapping[str, float] = field(default_factory=dict)
    refusal: str | None = None


def fit_question(question: Question, prices: PriceList | None, *, num_resamples: int, seed: int) -> Law:
    """Fits a law to its places.

    Args:
        question: what to fit.
        prices: of next cells; None where there are no places at all.
        num_resamples: of every interval.
        seed: of the resamples.
    """
    law = _empty(question)
    refusal = question.refusal
    num, needed = len(question.places), MIN_CELLS + 2 * (len(question.factors) - 1)
    if refusal is None and num < needed:
        refusal = f"{question.name} has {num} finished cells, and a power law with floor needs at least {needed}"
    if refusal is not None:
        return _refused(law, refusal)
    try:
        with np.errstate(over="ignore"):  # an interval without end is clipped below
            return _fitted(law, question.held, prices, num_resamples, seed)
    except ValueError as error:
        return _refused(law, str(error))


def _empty(question: Question) -> Law:
    column = {name: [_value(place, name) for place in question.places] for name in question.factors}
    compute = [place.compute for place in question.places]
    size_M = np.prod(list(column.values()), axis=0) if question.places else np.empty(0)
    order = np.argsort(size_M, kind="stable").tolist()
    forms = [PowerLaw(question.factors, has_floor) for has_floor in (True, False)]
    return Law(
        name=question.name,
        factors=question.factors,
        cell_ids=tuple(question.places[i].cell_id for i in order),
        values={name: tuple(values[i] for i in order) for name, values in column.items()},
        losses=tuple(question.places[i].loss for i in order),
        compute=tuple(compute[i] for i in order) if question.has_compute else None,
        fits=(FormFit(forms[0].name, True), FormFit(forms[1].name, False)),
    )


def _refused(law: Law, reason: str) -> Law:
    with_floor, without = law.fits
    return replace(
        law, fits=(replace(with_floor, refusal=reason), replace(without, refusal=reason)), forecast_refusal=reason
    )


def _fitted(law: Law, held: Mapping[str, float], prices: PriceList | None, num_resamples: int, seed: int) -> Law:
    cells = law.cells()
    fit = fit_law(PowerLaw(law.factors), cells, num_resamples=num_resamples, seed=seed)
    plain = fit_law(PowerLaw(law.factors, has_floor=False), cells, num_resamples=num_resamples, seed=seed)
    forecasts, forecast_refusal = _forecasts(fit.form, cells, num_resamples, seed)
    is_single = len(law.factors) == 1
    rivals: list[Form] = [plain.form, fit.form, *([BrokenPowerLaw(law.factors[0])] if is_single else [])]
    return replace(
        law,
        fits=(_form_fit(fit), _form_fit(plain)),
        band=_band(fit) if is_single else (),
        scores=tuple(map(_score, compare_forms(rivals, cells))),
        residuals=tuple(residual_table(fit)),
        forecasts=forecasts,
        forecast_refusal=forecast_refusal,
        next_steps=choose_next(fit, held, prices) if prices else (),
    )


def _form_fit(fit: Fit) -> FormFit:
    assert isinstance(fit.form, PowerLaw), "rival forms are compared, not stated"
    estimates = tuple(map(bounded, fit.estimates.values()))
    return FormFit(fit.form.name, fit.form.has_floor, estimates, fit.noise, fit.r_squared)


def bounded(estimate: Estimate) -> Estimate:
    """An estimate whose numbers are finite; refused where one is not a number at all."""
    numbers = np.array([estimate.value, estimate.low, estimate.high])
    refusals = estimate.refusals
    if np.isnan(numbers).any():
        refusals = (*refusals, "its interval cannot be computed: the cells leave next to no noise")
    value, low, high = np.nan_to_num(numbers, posinf=LARGEST_NUMBER, neginf=-LARGEST_NUMBER).tolist()
    return Estimate(estimate.name, value, low, high, refusals)


def _score(comparison: Comparison) -> FormScore:
    errors = (comparison.seen_error, comparison.fold_error, comparison.largest_error)
    seen, fold, largest = (error if math.isfinite(error) else None for error in errors)
    form = comparison.form
    return FormScore(form.name, form.num_parameters, seen, fold, largest, comparison.refusal)


def _forecasts(form: Form, cells: Cells, num_resamples: int, seed: int) -> tuple[tuple[Forecast, ...], str | None]:
    num_held = min(MAX_HELD, max(1, round(HELD_SHARE * len(cells))))
    try:
        _, found = forecast_largest(form, cells, num_held, num_resamples=num_resamples, seed=seed)
    except ValueError as error:
        return (), f"without its {num_held} largest cells: {error}"
    return tuple(replace(one, low=max(one.low, 0.0), high=min(one.high, LARGEST_NUMBER)) for one in found), None


def _band(fit: Fit) -> tuple[BandPoint, ...]:
    """Over the cells and a little beyond."""
    name = fit.form.factors[0]
    values_M = fit.cells.factors[name]
    places = {name: np.geomspace(values_M.min() / BAND_MARGIN, values_M.max() * BAND_MARGIN, BAND_POINTS)}
    low_M, high_M = fit.intervals(places, of_cell=False)
    columns = np.stack([places[name], fit.predict(places), low_M, np.minimum(high_M, LARGEST_NUMBER)], axis=1)
    return tuple(BandPoint(*row) for row in columns.tolist())


def add_doubling(law: Law, x: float, compute: Sequence[float], num_resamples: int, seed: int) -> Law:
    """A law in one factor, with what a doubling from `x` does.

    Args:
        law: with its fit; a refused one is returned as it is.
        x: where to start.
        compute: of its cells, in their order.
        num_resamples: as the law was fitted with.
        seed: likewise.
    """
    if law.refusal is not None:
        return law
    name, fit = law.factors[0], law.refit(num_resamples, seed)
    growth = elasticity(np.array(law.values[name]), np.array(compute))
    by_compute = slope = None
    with np.errstate(over="ignore"):
        by_factor = bounded(fit.change("change of log loss per doubling", {name: x}, {name: 2 * x}))
        if growth >= MIN_ELASTICITY:
            end, step = x * 2 ** (1 / growth), SMALL_STEP ** (0.5 / growth)
            by_compute = bounded(fit.change("change of log loss per doubling of compute", {name: x}, {name: end}))
            tiny, width = fit.change("slope", {name: x / step}, {name: x * step}), math.log(SMALL_STEP)
            slope = bounded(Estimate("d log L / d log C", tiny.value / width, tiny.low / width, tiny.high / width))
    return replace(law, doubling=Doubling(x, growth, by_factor, by_compute, slope))


def _value(place: Place, factor: str) -> float:
    return place.compute if factor == "C" else place.factors[factor]
