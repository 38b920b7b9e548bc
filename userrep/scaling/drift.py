"""Has scaling changed between two sweeps: constants whose intervals part, and a forecast of the new by the old.

Intervals are those of each sweep; with a dozen constants, one in two comparisons of equal sweeps flags one at 95%, so a
single flag is a reason to look and not a proof.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from userrep.scaling.answers import difference
from userrep.scaling.fit import Estimate
from userrep.scaling.records import Law, Laws
from userrep.scaling.runs import ARMS
from userrep.scaling.wording import interval, place

COMPARED = ("exponent_", "irreducible_loss")
DOUBLING = "change of log loss per doubling"  # known well even where an exponent is not stated


@dataclass(frozen=True)
class Change:
    """A constant in both sweeps.

    Attributes:
        law: its law.
        name: of the constant.
        earlier: its estimate then.
        later: its estimate now.
        difference: later minus earlier, with its interval; None where it cannot be said.
        has_drifted: whether that interval excludes 0.
        refusal: why it cannot be said; None where it can.
    """

    law: str
    name: str
    earlier: Estimate | None
    later: Estimate | None
    difference: Estimate | None
    has_drifted: bool
    refusal: str | None = None

    def __str__(self) -> str:
        """For people."""
        subject = f"{self.law} {self.name}"
        if self.difference is None or self.earlier is None or self.later is None:
            return f"{subject}: cannot be said, because {self.refusal}"
        verdict = "drifted" if self.has_drifted else "no drift seen"
        return f"{subject}: {verdict}; {interval(self.earlier)} then, {interval(self.later)} now"


@dataclass(frozen=True)
class CenterForecast:
    """The new center cell by the old law.

    Attributes:
        law: of the earlier sweep that says it.
        measured: loss of the new center cell.
        predicted: by the old law.
        low: end of the 95% interval of a run there.
        high: the other end.
    """

    law: str
    measured: float
    predicted: float
    low: float
    high: float

    @property
    def is_inside(self) -> bool:
        """Whether the interval holds what was measured."""
        return self.low <= self.measured <= self.high

    def __str__(self) -> str:
        """For people."""
        verdict = "inside" if self.is_inside else "outside"
        return (
            f"the earlier {self.law} forecasts {self.predicted:.4g} (95% interval {self.low:.4g} to {self.high:.4g}) "
            f"for the new center cell, which measured {self.measured:.4g}: {verdict}"
        )


@dataclass(frozen=True)
class Drift:
    """Two sweeps compared.

    Attributes:
        earlier: name of the earlier sweep.
        changes: every constant that either sweep has.
        center: forecast of the new center cell; None where it cannot be said.
        center_refusal: why; None where it can.
    """

    earlier: str
    changes: tuple[Change, ...]
    center: CenterForecast | None
    center_refusal: str | None

    @property
    def drifted(self) -> tuple[Change, ...]:
        """What is flagged."""
        return tuple(change for change in self.changes if change.has_drifted)

    def __str__(self) -> str:
        """A verdict in one or two sentences."""
        compared = [change for change in self.changes if change.difference is not None]
        if not compared:
            verdict = f"Nothing can be compared with {self.earlier}."
        elif not self.drifted:
            verdict = f"No drift seen against {self.earlier} in {len(compared)} constants."
        else:
            names = ", ".join(f"{change.law} {change.name}" for change in self.drifted)
            verdict = f"{len(self.drifted)} of {len(compared)} constants have drifted against {self.earlier}: {names}."
        center = (
            f"the new center cell cannot be forecast: {self.center_refusal}" if self.center is None else self.center
        )
        sentence = str(center)
        return f"{verdict} {sentence[0].upper()}{sentence[1:]}."


def compare_laws(earlier: Laws, later: Laws) -> Drift:
    """Compares exponents and floors of the forms with floor, law by law."""
    reason = _incomparable(earlier, later)
    pairs = [(old, new) for old in earlier.laws for new in later.laws if old.name == new.name]
    changes = tuple(change for old, new in pairs for change in _changes(old, new, reason))
    if reason is not None:
        return Drift(earlier.facts.sweep, changes, None, reason)
    try:
        return Drift(earlier.facts.sweep, changes, _forecast_center(earlier, later), None)
    except ValueError as error:
        return Drift(earlier.facts.sweep, changes, None, str(error))


def _incomparable(earlier: Laws, later: Laws) -> str | None:
    pools = [laws.facts.pool_size for laws in (earlier, later)]
    if None in pools or pools[0] == pools[1]:
        return None
    return f"losses were measured among {pools[0]} users then and {pools[1]} now"


def _changes(old: Law, new: Law, reason: str | None) -> Iterator[Change]:
    names = dict.fromkeys(one.name for law in (old, new) for one in law.with_floor.estimates)
    for name in names:
        if name.startswith(COMPARED):
            yield _change(old, new, name, reason)
    if old.doubling is not None and new.doubling is not None:
        moved = None if math.isclose(old.doubling.x, new.doubling.x, rel_tol=1e-3) else "the center has moved"
        yield _compared(new, DOUBLING, old.doubling.factor_change, new.doubling.factor_change, reason or moved)
    if not names:
        yield Change(new.name, "law", None, None, None, False, f"it is in neither sweep (now: {new.refusal})")


def _change(old: Law, new: Law, name: str, reason: str | None) -> Change:
    before, after = old.with_floor.estimate(name), new.with_floor.estimate(name)
    refusal = reason or _unstated("earlier", old, before) or _unstated("later", new, after)
    return _compared(new, name, before, after, refusal)


def _compared(new: Law, name: str, before: Estimate | None, after: Estimate | None, refusal: str | None) -> Change:
    if refusal is not None or before is None or after is None:
        return Change(new.name, name, before, after, None, False, refusal)
    gap = difference(after, before)
    # Where intervals do not overlap, that of the difference excludes 0 as well.
    return Change(new.name, name, before, after, gap, not gap.low <= 0 <= gap.high)


def _unstated(when: str, law: Law, estimate: Estimate | None) -> str | None:
    if estimate is None:
        return f"the {when} sweep has no {law.name}: {law.refusal}"
    return None if estimate.is_stated else f"the {when} one is not stated: {'; '.join(estimate.refusals)}"


def _forecast_center(earlier: Laws, later: Laws) -> CenterForecast:
    """By the law of the factors in which the two centers differ.

    Raises:
        ValueError: no old law has them.
    """
    old, new = earlier.center_place, later.center_place
    if old is None or new is None:
        raise ValueError(f"the {'earlier' if old is None else 'later'} sweep has no finished center cell")
    moved = {name for name in ARMS if not math.isclose(old.factors[name], new.factors[name], rel_tol=1e-3)}
    fitted = [law for law in earlier.laws if law.name != "L(C)" and law.refusal is None]
    # The law of the most cells first: it has the narrowest interval.
    candidates = sorted(fitted, key=lambda law: -len(law.cell_ids))
    law = next((law for law in candidates if moved <= set(law.factors)), None)
    if law is None:
        raise ValueError(
            f"no law of the earlier sweep has all of {sorted(moved) or 'its factors'}: its center is "
            f"{place(old.factors)}, the new one {place(new.factors)}"
        )
    fit = law.refit(earlier.num_resamples, earlier.seed)
    at = {name: np.array([new.factors[name]]) for name in law.factors}
    with np.errstate(over="ignore"):
        low_1, high_1 = fit.intervals(at, of_cell=True)
    return CenterForecast(law.name, new.loss, float(fit.predict(at)[0]), float(low_1[0]), float(high_1[0]))
