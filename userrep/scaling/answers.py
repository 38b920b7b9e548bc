"""What a sweep says about the questions that scaling laws of user representations are asked, in words with intervals.

Source: findings that a reader will compare with are those of CLUE (arXiv 2111.11294): loss falls as a power law of
compute; a larger model does not help at small batch; length always helps but size comes first; downstream follows the
pretraining loss. Nothing here assumes any of them.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from userrep.scaling.fit import TAILS, Estimate
from userrep.scaling.records import Correlation, Doubling, Law, Laws
from userrep.scaling.runs import ARMS, Place
from userrep.scaling.wording import FACTOR_NAMES, amount, correlation, fall, interval

UNKNOWN = "Cannot be said, because "
SAME = 0.05  # relative difference up to which two places have the same samples: a batch has a whole number of steps


@dataclass(frozen=True)
class Answer:
    """A question and what the sweep says.

    Attributes:
        question: in words.
        text: the answer with its interval, or `Cannot be said, because ...`.
        is_answered: whether there is an answer.
    """

    question: str
    text: str
    is_answered: bool = True


def answer_questions(laws: Laws) -> tuple[Answer, ...]:
    """All questions, answered or not."""
    return (
        _compute(laws),
        _best_use(laws),
        _division(laws),
        _small_batch(laws),
        _follows("Does the pretraining loss predict the downstream loss?", laws, "downstream_losses/", 1),
        _follows("Do downstream scores follow the loss?", laws, "downstream_scores/", -1),
        _follows("Does recall follow the loss?", laws, "recall_at_", -1),
    )


def _unknown(question: str, reason: str) -> Answer:
    return Answer(question, f"{UNKNOWN}{reason}.", is_answered=False)


def _compute(laws: Laws) -> Answer:
    question, law = "How does the loss fall with compute?", laws.law("L(C)")
    if law.refusal is not None:
        return _unknown(question, law.refusal)
    exponent, floor = law.with_floor.estimate("exponent_C"), law.with_floor.estimate("irreducible_loss")
    assert exponent is not None, "a fitted law in one factor"
    assert floor is not None, "of the form with floor"
    assert law.doubling is not None, "a fitted law in one factor"
    middle = f"At {law.doubling.x:.2g} FLOPs, twice the compute lowers the loss by {fall(law.doubling.factor_change)}"
    if exponent.is_stated:
        towards = f"towards a floor of {interval(floor)}"
        return Answer(
            question,
            f"As a power of compute with the exponent {interval(exponent)}, {towards}. {middle}.{_tested(law)}",
        )
    reason = f"The exponent of a power law with floor is not stated: {'; '.join(exponent.refusals)}"
    return Answer(question, f"{middle}. {reason}.{_tested(law)}")


def _tested(law: Law) -> str:
    """How its forecasts of held-out cells did."""
    num, inside = len(law.forecasts), sum(forecast.is_inside for forecast in law.forecasts)
    if not num:
        return ""
    warning = "" if inside == num else ": do not extrapolate it"
    return f" Of its largest cells, held out, {law.name} forecasts {inside} of {num} within the interval{warning}."


def _best_use(laws: Laws) -> Answer:
    question = "What is the better use of more compute here: size, data, length or batch?"
    arms = {factor: laws.law(f"L({factor})") for factor in ARMS}
    known = {factor: law.doubling for factor, law in arms.items() if law.doubling is not None}
    paid = {factor: doubling.compute_change for factor, doubling in known.items() if doubling.compute_change}
    missing = _missing(arms.values())
    if len(paid) < 2:
        return _unknown(question, f"it takes two arms that cost compute, and there are {len(paid)} ({missing})")
    ranked = sorted(paid, key=lambda factor: paid[factor].value)
    phrases = [f"{FACTOR_NAMES[factor]} lowers the loss by {fall(paid[factor])}" for factor in ranked]
    text = f"From the center, twice the compute spent on {'; on '.join(phrases)}. {_verdict(ranked, paid)}"
    text += "".join(f" {_free(factor, doubling)}" for factor, doubling in known.items() if factor not in paid)
    return Answer(question, text + (f" Not known: {missing}." if missing else ""))


def _missing(laws: Iterable[Law]) -> str:
    """Laws that were refused, by reason."""
    names = defaultdict[str, list[str]](list)
    for law in laws:
        if law.refusal is not None:
            names[law.refusal].append(law.name)
    return "; ".join(f"{', '.join(found)}: {reason}" for reason, found in names.items())


def _verdict(ranked: Sequence[str], paid: dict[str, Estimate]) -> str:
    """Those whose fall may be the largest, by the interval of the difference to the first."""
    first = ranked[0]
    rivals = [FACTOR_NAMES[factor] for factor in ranked[1:] if difference(paid[factor], paid[first]).low <= 0]
    if not rivals:
        return f"The best use is {FACTOR_NAMES[first]}."
    others = " and ".join(rivals)
    return f"The sweep does not separate {FACTOR_NAMES[first]} from {others}: their difference may be 0."


def difference(left: Estimate, right: Estimate) -> Estimate:
    """Left minus right with the interval of independent estimates: half widths add as squares, each side on its own.

    Source: MOVER, Zou and Donner, Statistics in Medicine 27 (2008).
    """
    low = math.hypot(left.value - left.low, right.high - right.value)
    high = math.hypot(left.high - left.value, right.value - right.low)
    value = left.value - right.value
    return Estimate(f"{left.name} - {right.name}", value, value - low, value + high)


def _free(factor: str, doubling: Doubling) -> str:
    return (
        f"Twice the {FACTOR_NAMES[factor]}, which costs nearly no compute at equal samples, lowers the loss by "
        f"{fall(doubling.factor_change)}."
    )


def _division(laws: Laws) -> Answer:
    question, law = "How should compute be divided between model and samples?", laws.law("L(N, D)")
    if law.refusal is not None:
        return _unknown(question, law.refusal)
    share = law.with_floor.estimate("compute_exponent_N")
    assert share is not None, "a fitted law in two factors"
    if not share.is_stated:
        return _unknown(question, "; ".join(share.refusals))
    text = f"The best model grows as compute to the power {interval(share)}, and samples as what is left"
    if share.low <= 0.5 <= share.high:
        text += "; equal growth of both (0.5) is within the interval"
    return Answer(question, f"{text}, where operations are in proportion to N times D.{_tested(law)}")


def _small_batch(laws: Laws) -> Answer:
    question = "Does a larger model help at small batch?"
    groups = _model_groups(laws.places)
    noise = _noise(laws)
    if not groups:
        return _unknown(
            question, "no two cells differ in model alone: run several models at the smallest batch of the sweep"
        )
    smallest, lowest = min(groups), min(place.factors["B"] for place in laws.places)
    if all(place.factors["B"] == lowest for place in laws.places):
        return _unknown(question, f"all cells have the batch {amount(lowest)}: run models at several batches")
    if smallest > lowest:
        reason = (
            f"cells that differ in model have batches of {amount(smallest)} or more, and the smallest batch is "
            f"{amount(lowest)}: run two models there"
        )
        return _unknown(question, reason)
    if noise is None:
        return _unknown(question, "the noise between cells is not known: repeat a cell with another seed")
    small, large = (_by_model(groups[batch], *noise) for batch in (smallest, max(groups)))
    text = f"At batch {amount(smallest)}, twice the model lowers the loss by {fall(small)}"
    if max(groups) == smallest:
        return Answer(question, f"{text}. At larger batches the sweep has no cells that differ in model.")
    gap = difference(small, large)
    more = "more" if gap.low > 0 else "less" if gap.high < 0 else "not clearly more or less"
    text += f"; at batch {amount(max(groups))} by {fall(large)}: {more} than at the small one"
    helps = "helps" if small.high < 0 else "does not clearly help"
    return Answer(question, f"{text}. So a larger model {helps} at small batch.")


def _model_groups(places: Sequence[Place]) -> dict[float, list[Place]]:
    """By batch, the largest set of cells that differ in model alone; batches without two models are left out."""
    sets = defaultdict[tuple[float, float, int], list[Place]](list)
    for place in places:
        samples = round(math.log(place.factors["D"]) / math.log1p(SAME))
        sets[place.factors["B"], place.factors["S"], samples].append(place)
    found = dict[float, list[Place]]()
    for (batch, _, _), members in sets.items():
        models = {place.factors["N"] for place in members}
        if len(models) > 1 and len(models) > len({place.factors["N"] for place in found.get(batch, [])}):
            found[batch] = members
    return found


def _noise(laws: Laws) -> tuple[float, int] | None:
    """Standard deviation of log loss of a cell, and its degrees of freedom: of the law with the most of them."""
    fitted = [law for law in laws.laws if law.with_floor.noise is not None and law.name != "L(C)"]
    if not fitted:
        return None
    law = max(fitted, key=_freedom)
    assert law.with_floor.noise is not None, "of a fitted law"
    return max(law.with_floor.noise, laws.facts.seed_noise or 0.0), _freedom(law)


def _freedom(law: Law) -> int:
    return len(law.cell_ids) - 2 * len(law.factors) - 1


def _by_model(places: Sequence[Place], noise: float, freedom: int) -> Estimate:
    """Change of log loss per doubling of the model by least squares, with the noise of the sweep."""
    x_M = np.log2([place.factors["N"] for place in places])
    y_M = np.log([place.loss for place in places])
    x_M -= x_M.mean()
    squares = float((x_M**2).sum())
    value = float(x_M @ y_M) / squares
    half = float(student.ppf(TAILS[1], freedom)) * noise / math.sqrt(squares)
    return Estimate("change of log loss per doubling of the model", value, value - half, value + half)


def _follows(question: str, laws: Laws, prefix: str, sign: int) -> Answer:
    """Rank correlations of the loss with measures; `sign` is that of following."""
    found = [one for one in laws.correlations if one.measure.startswith(prefix)]
    if not found:
        return _unknown(question, "no finished cell has it")
    if not any(one.value.is_stated for one in found):
        return _unknown(question, "; ".join(f"{one.measure}: {'; '.join(one.value.refusals)}" for one in found))
    return Answer(question, " ".join(_phrase(one, sign) for one in found))


def _phrase(found: Correlation, sign: int) -> str:
    name = found.measure.removeprefix("downstream_losses/").removeprefix("downstream_scores/")
    if not found.value.is_stated:
        return f"{name}: cannot be said, because {'; '.join(found.value.refusals)}."
    low, high = sorted((sign * found.value.low, sign * found.value.high))
    word = "yes" if low > 0 else "no, the other way round" if high < 0 else "not clearly"
    return f"{name}: {word}, rank correlation {correlation(found.value)} over {found.num_places} places."
