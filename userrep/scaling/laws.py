"""From a table of runs to laws: compute on the efficient frontier, each factor on its arm, model and samples together.

Places and their losses come from `userrep.scaling.runs`, the fit of one law from `userrep.scaling.law`; here is which
places a law is fitted to, and what a design cannot answer.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from userrep.scaling.correlation import rank_correlation
from userrep.scaling.fit import NUM_RESAMPLES
from userrep.scaling.law import Question, add_doubling, fit_question
from userrep.scaling.pricing import make_price_list
from userrep.scaling.records import FIT_VERSION, Correlation, Law, Laws
from userrep.scaling.runs import ARMS, Place, read_runs

LAW_NAMES = ("L(C)", "L(N)", "L(D)", "L(S)", "L(B)", "L(N, D)")
MAX_CORRELATION = 0.95  # between log N and log D, either sign, at which their exponents are told apart
SAME_COMPUTE = 1.05  # a factor; a cell meets its budget within 2% (`grid.ISOFLOP_TOLERANCE`)
MEASURES = ("downstream_losses", "downstream_scores", "recalls")


def fit_laws(runs: pa.Table, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Laws:
    """Fits every law that the finished cells allow and says of the others why not.

    Args:
        runs: of the schema RUNS; may hold no finished cell.
        num_resamples: of every interval; under 200, their ends are noisy.
        seed: of the resamples.

    Raises:
        ValueError: columns are missing.
    """
    facts, places = read_runs(runs)
    center = next((place for place in places if place.factor == "center"), None)
    # A longer history is more to go by, in the evaluation too, so only equal ones can be efficient with their compute.
    front = frontier([place for place in places if center is None or place.factors["S"] == center.factors["S"]])
    prices = make_price_list(places, facts.flops_per_s) if places else None
    questions = [
        Question("L(C)", ("C",), front, has_compute=True),
        *(_arm(factor, places, center) for factor in ARMS),
        _joint(places, center),
    ]
    laws = [fit_question(one, prices, num_resamples=num_resamples, seed=seed) for one in questions]
    return Laws(
        version=FIT_VERSION,
        facts=facts,
        center=None if center is None else center.cell_id,
        places=places,
        frontier=tuple(place.cell_id for place in front),
        laws=tuple(_doubled(law, places, center, num_resamples, seed) for law in laws),
        correlations=_correlations(places, num_resamples, seed),
        num_resamples=num_resamples,
        seed=seed,
    )


def frontier(places: Sequence[Place]) -> tuple[Place, ...]:
    """The compute-efficient places: none that costs SAME_COMPUTE times as much or less has a lower loss.

    Without that margin all cells of a budget would count, which cost the same but for a rest of a step.

    Source: Pareto front of OpenCLIP's scaling laws (arXiv 2212.07143, section 4). Differs: the margin; and the whole
    front, none of its cells taken out by hand.

    Returns:
        The cheapest first.
    """
    found = []
    for place in sorted(places, key=lambda place: (place.compute, place.loss)):
        rivals = (other.loss for other in places if other.compute <= SAME_COMPUTE * place.compute)
        if place.loss <= min(rivals):
            found.append(place)
    return tuple(found)


def _arm(factor: str, places: Sequence[Place], center: Place | None) -> Question:
    """The center and the cells of its arm. The arm's own range decides on refusals: batch costs no compute."""
    name = f"L({factor})"
    if center is None:
        reason = "the design has no finished center cell: arms meet there; run a star design"
        return Question(name, (factor,), (), has_compute=False, refusal=reason)
    arm = tuple(place for place in places if place.factor == ARMS[factor])
    if not arm:
        reason = f"the design has no finished cells of the arm {ARMS[factor]}: give it levels of {factor}"
        return Question(name, (factor,), (center,), has_compute=False, refusal=reason)
    chosen = sorted((center, *arm), key=lambda place: place.factors[factor])
    refusal = None
    log_x, log_loss = (np.log(values) for values in zip(*((p.factors[factor], p.loss) for p in chosen), strict=True))
    if len(chosen) > 2 and np.ptp(log_x) > 0 and np.polyfit(log_x, log_loss, 1)[0] >= 0:
        refusal = (
            f"the loss does not fall with {factor}: it is {chosen[0].loss:.4g} at {chosen[0].factors[factor]:,.0f} and "
            f"{chosen[-1].loss:.4g} at {chosen[-1].factors[factor]:,.0f}, which no falling power law describes"
        )
    return Question(name, (factor,), tuple(chosen), has_compute=False, held=center.factors, refusal=refusal)


def _joint(places: Sequence[Place], center: Place | None) -> Question:
    """Places that have the history and batch of the center; without one, those that most places have."""
    if not places:
        return Question("L(N, D)", ("N", "D"), (), has_compute=True)
    common = Counter((place.factors["S"], place.factors["B"]) for place in places).most_common(1)[0][0]
    held = common if center is None else (center.factors["S"], center.factors["B"])
    chosen = tuple(place for place in places if (place.factors["S"], place.factors["B"]) == held)
    refusal = None
    log_2M = np.log([[place.factors[name] for place in chosen] for name in ("N", "D")])
    if len(chosen) > 2 and np.ptp(log_2M, axis=1).min() > 0:
        correlation = float(np.corrcoef(log_2M)[0, 1])
        if abs(correlation) > MAX_CORRELATION:
            refusal = (
                f"log N and log D of the {len(chosen)} cells have the correlation {correlation:.3f}, of at most "
                f"{MAX_CORRELATION:g}: what one does cannot be told from what the other does; vary them apart"
            )
    return Question("L(N, D)", ("N", "D"), chosen, True, {"S": held[0], "B": held[1]}, refusal)


def _doubled(law: Law, places: Sequence[Place], center: Place | None, num_resamples: int, seed: int) -> Law:
    if law.refusal is not None or len(law.factors) > 1:
        return law
    compute = {place.cell_id: place.compute for place in places}
    [(factor, values)] = law.values.items()
    x = values[len(values) // 2] if center is None else center.factors.get(factor, center.compute)
    return add_doubling(
        law, float(np.clip(x, values[0], values[-1])), [compute[i] for i in law.cell_ids], num_resamples, seed
    )


def _correlations(places: Sequence[Place], num_resamples: int, seed: int) -> tuple[Correlation, ...]:
    """Of the loss with everything that was measured beside it."""
    found = []
    for kind in MEASURES:
        for task in sorted({task for place in places for task in getattr(place, kind)}):
            pairs = [(place.loss, getattr(place, kind)[task]) for place in places if task in getattr(place, kind)]
            name = task if kind == "recalls" else f"{kind}/{task}"
            loss_M, measure_M = np.array(pairs).T
            value = rank_correlation(name, loss_M, measure_M, num_resamples=num_resamples, seed=seed)
            found.append(Correlation(name, len(pairs), value))
    return tuple(found)
