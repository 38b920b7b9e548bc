"""What the fits of a sweep leave: laws with intervals, refusals and tests, and their JSON form `fit.json`.

A later sweep is compared with this file alone, so a law keeps the cells that it was fitted to and can be fitted again.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from userrep.scaling.cells import Cells
from userrep.scaling.fit import Estimate, Fit, fit_law
from userrep.scaling.forecast import Forecast, Residual
from userrep.scaling.forms import PowerLaw
from userrep.scaling.runs import Place, SweepFacts

FIT_NAME = "fit.json"
FIT_VERSION = 1


@dataclass(frozen=True)
class FormFit:
    """One form fitted to the cells of a law.

    Attributes:
        form: its name.
        has_floor: whether the power law has an irreducible loss.
        estimates: of its constants, each with its interval or why it is not stated; empty where it was not fitted.
        noise: standard deviation of log loss about it.
        r_squared: share of the variance of log loss that it explains.
        refusal: why it was not fitted; None where it was.
    """

    form: str
    has_floor: bool
    estimates: tuple[Estimate, ...] = ()
    noise: float | None = None
    r_squared: float | None = None
    refusal: str | None = None

    def estimate(self, name: str) -> Estimate | None:
        """A constant by its name; None where the form was not fitted or has no such constant."""
        return next((found for found in self.estimates if found.name == name), None)


@dataclass(frozen=True)
class FormScore:
    """How well a form does on cells that it has not seen: root mean squares of log loss; see `forecast.Comparison`."""

    form: str
    num_parameters: int
    seen_error: float | None
    fold_error: float | None
    largest_error: float | None
    refusal: str | None = None


@dataclass(frozen=True)
class BandPoint:
    """The law at a place on its one factor, with the 95% interval of the law (not of a run)."""

    x: float
    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Doubling:
    """What more of a factor does, from the center of the sweep (of L(C): from its middle cell).

    Attributes:
        x: where, in the factor.
        elasticity: d log C / d log x on the cells of the law: about 1 where compute grows with the factor.
        factor_change: log of the loss at 2 x over that at x.
        compute_change: the same for as much of the factor as doubles compute; None where the factor costs no compute.
        slope: d log L / d log C at x; None likewise.
    """

    x: float
    elasticity: float
    factor_change: Estimate
    compute_change: Estimate | None
    slope: Estimate | None


@dataclass(frozen=True)
class NextStep:
    """A cell that is worth running.

    Attributes:
        rule: `exponent`: it tells most of an exponent for its price; `forecast`: it tells most of a larger cell's loss.
        target: quantity that it makes better known.
        factors: its place, N, D, S, B where they are known; C for a law of compute.
        width_cut: share of the width of the target's interval that goes.
        flops: its price.
        hours: on the device of the sweep; None where its speed is not known.
    """

    rule: str
    target: str
    factors: dict[str, float]
    width_cut: float
    flops: float
    hours: float | None


@dataclass(frozen=True)
class Law:
    """A law and how it stands.

    Attributes:
        name: L(C), L(N), L(D), L(S), L(B) or L(N, D).
        factors: what varies.
        cell_ids: places that it is fitted to, the smallest first; residuals and forecasts count by this order.
        values: of each factor its value at these places.
        losses: there.
        compute: there; None where the factor's own range alone decides on refusals.
        fits: power law with floor, and without.
        band: of the form with floor, for figures; empty for two factors and where it was not fitted.
        scores: of the rival forms, the best forecaster first.
        residuals: of the form with floor, the worst first.
        forecasts: of the largest cells by a fit without them.
        forecast_refusal: why there are none.
        doubling: what more of the factor does.
        next_steps: cells that are worth running.
    """

    name: str
    factors: tuple[str, ...]
    cell_ids: tuple[str, ...]
    values: dict[str, tuple[float, ...]]
    losses: tuple[float, ...]
    compute: tuple[float, ...] | None
    fits: tuple[FormFit, FormFit]
    band: tuple[BandPoint, ...] = ()
    scores: tuple[FormScore, ...] = ()
    residuals: tuple[Residual, ...] = ()
    forecasts: tuple[Forecast, ...] = ()
    forecast_refusal: str | None = None
    doubling: Doubling | None = None
    next_steps: tuple[NextStep, ...] = ()

    @property
    def with_floor(self) -> FormFit:
        """The form that the report states."""
        return self.fits[0]

    @property
    def refusal(self) -> str | None:
        """Why there is no law; None where there is one."""
        return self.with_floor.refusal

    def cells(self) -> Cells:
        """What it is fitted to."""
        factors = {name: np.array(values) for name, values in self.values.items()}
        return Cells(factors, np.array(self.losses), None if self.compute is None else np.array(self.compute))

    def refit(self, num_resamples: int, seed: int) -> Fit:
        """The form with floor, with its resamples; the same as when the file was written.

        Raises:
            ValueError: the law was refused.
        """
        if self.refusal is not None:
            raise ValueError(f"{self.name} was not fitted: {self.refusal}")
        return fit_law(PowerLaw(self.factors), self.cells(), num_resamples=num_resamples, seed=seed)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation between the loss and another measure over places.

    Attributes:
        measure: `downstream_losses/<task>`, `downstream_scores/<task>`, `recall_at_10`, ...
        num_places: that have both.
        value: the correlation, with its bootstrap interval or why it is not stated.
    """

    measure: str
    num_places: int
    value: Estimate


@dataclass(frozen=True)
class Laws:
    """Everything that a sweep says of scaling.

    Attributes:
        version: of this form of JSON.
        facts: how the sweep was run.
        center: cell_id of the place where the arms meet; None where the design has none.
        places: all of them, the cheapest first.
        frontier: cell_ids of the compute-efficient places.
        laws: L(C), the four arms, L(N, D).
        correlations: of the loss with what is measured beside it.
        num_resamples: of every interval.
        seed: of the resamples.
    """

    version: int
    facts: SweepFacts
    center: str | None
    places: tuple[Place, ...]
    frontier: tuple[str, ...]
    laws: tuple[Law, ...]
    correlations: tuple[Correlation, ...]
    num_resamples: int
    seed: int

    def law(self, name: str) -> Law:
        """A law by its name, such as `L(C)`."""
        return next(law for law in self.laws if law.name == name)

    def place(self, cell_id: str) -> Place:
        """A place by the id of its cell."""
        return next(place for place in self.places if place.cell_id == cell_id)

    @property
    def center_place(self) -> Place | None:
        """Where the arms meet."""
        return None if self.center is None else self.place(self.center)

    def save(self, path: Path) -> None:
        """Writes the JSON form; a reader sees the old file or the complete new one."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(_LAWS.dump_json(self, indent=1) + b"\n")
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> "Laws":
        """Reads the JSON form.

        Raises:
            ValueError: it is not one, or of another version.
        """
        try:
            laws = _LAWS.validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors()[0]
            place = ".".join(map(str, problem["loc"]))
            raise ValueError(
                f"{path} is not the {FIT_NAME} of a sweep (at {place!r}: {problem['msg']}): give one that a report has "
                "written"
            ) from error
        if laws.version != FIT_VERSION:
            raise ValueError(
                f"{path} has version {laws.version}, and this package reads {FIT_VERSION}: write the report of that "
                "sweep again from its table of runs"
            )
        return laws


_LAWS = TypeAdapter(Laws)
