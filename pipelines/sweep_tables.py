"""Rows of the tables in the report of a sweep, as they are printed: the numbers of `fit.json`, rounded."""

from userrep.scaling.fit import Estimate
from userrep.scaling.records import Law, Laws
from userrep.scaling.wording import cost, duration, place

Row = dict[str, str]
CONSTANTS = {"irreducible_loss": "floor E", "coefficient": "coefficient A", "exponent": "exponent"}


def constant_rows(laws: Laws) -> list[Row]:
    """A row for each constant of both forms of every fitted law; one that is not stated has a reason for a value."""
    rows = []
    for law in laws.laws:
        for form in law.fits:
            for estimate in form.estimates:
                rows.append(
                    {
                        "law": law.name,
                        "form": "with floor" if form.has_floor else "without floor",
                        "constant": _constant(estimate.name),
                        "value": number(estimate.value) if estimate.is_stated else "",
                        "interval": _ends(estimate) if estimate.is_stated else "",
                        "refusal": "; ".join(estimate.refusals),
                        "n": str(len(law.cell_ids)),
                        "r_squared": "" if form.r_squared is None else f"{form.r_squared:.4f}",
                        "noise": "" if form.noise is None else f"{100 * form.noise:.2g}%",
                        "is_main": "yes" if form.has_floor else "",
                    }
                )
    return rows


def form_rows(laws: Laws) -> list[Row]:
    """Rival forms of every law, the best forecaster of the largest cells first."""
    return [
        {
            "law": law.name,
            "form": score.form,
            "parameters": str(score.num_parameters),
            "seen": _error(score.seen_error),
            "fold": _error(score.fold_error),
            "largest": _error(score.largest_error),
            "refusal": score.refusal or "",
            "is_best": "yes" if score is law.scores[0] and score.refusal is None else "",
        }
        for law in laws.laws
        for score in law.scores
    ]


def forecast_rows(laws: Laws) -> list[Row]:
    """Held-out cells of every law beside what a fit without them said."""
    return [
        {
            "law": law.name,
            "place": _place(laws, law, one.cell),
            "measured": number(one.measured),
            "predicted": number(one.predicted),
            "interval": f"{number(one.low)} to {number(one.high)}",
            "error": f"{100 * one.log_error:+.1f}%",
            "inside": "inside" if one.is_inside else "outside",
        }
        for law in laws.laws
        for one in law.forecasts
    ]


def residual_rows(laws: Laws) -> list[tuple[str, list[Row]]]:
    """Of every fitted law its name and cells, the worst first."""
    return [
        (
            law.name,
            [
                {
                    "place": _place(laws, law, one.cell),
                    "cell": law.cell_ids[one.cell],
                    "measured": number(one.measured),
                    "fitted": number(one.fitted),
                    "residual": f"{100 * one.log_residual:+.2f}%",
                    "standardised": f"{one.standardised:+.1f}",
                }
                for one in law.residuals
            ],
        )
        for law in laws.laws
        if law.residuals
    ]


def next_rows(laws: Laws) -> list[Row]:
    """Cells that are worth running, by law; those of L(N, D) first, whose exponents carry farthest."""
    ordered = sorted(laws.laws, key=lambda law: -len(law.factors))
    return [
        {
            "law": law.name,
            "target": _target(law, step.target),
            "place": place(step.factors),
            "price": cost(step.flops, step.hours),
            "cut": f"interval {100 * step.width_cut:.0f}% narrower",
        }
        for law in ordered
        for step in law.next_steps
    ]


def fact_rows(laws: Laws) -> list[tuple[str, str]]:
    """What was run and how it was measured."""
    facts, center = laws.facts, laws.center_place
    rates = max((one.num_rates for one in laws.places), default=0)
    seeds = max((one.num_seeds for one in laws.places), default=0)
    rows = [
        ("cells", f"{facts.num_finished} finished, {facts.num_failed} failed, {facts.num_planned} planned"),
        ("places of the design", f"{len(laws.places)}, {len(laws.frontier)} of them on the frontier"),
        ("center", place(center.factors) if center else "none"),
        ("compute", f"{facts.flops:.3g} FLOPs over {facts.decades:.2f} decades; steps that cells share count for each"),
        ("time of training and evaluation", f"{duration(facts.hours)}, likewise"),
        ("speed", "not measured" if facts.flops_per_s is None else f"median {facts.flops_per_s:.3g} FLOP/s of a cell"),
        ("devices", ", ".join(facts.devices) or "none"),
        ("package versions", ", ".join(facts.code_versions) or "none"),
        ("evaluation pool", f"{facts.pool_size:,} users, the same for all cells" if facts.pool_size else "none"),
        ("learning rates", f"up to {rates} a place; the best one counts"),
        ("seeds", f"up to {seeds} a place; their mean counts" if seeds else "none"),
        (
            "noise between seeds",
            "not measured" if facts.seed_noise is None else f"{100 * facts.seed_noise:.2g}% of the loss",
        ),
        ("resamples of an interval", str(laws.num_resamples)),
    ]
    return rows + [("left out", note) for note in facts.left_out]


def number(value: float) -> str:
    """Four digits, as everywhere in the report."""
    return f"{value:.4g}"


def _ends(estimate: Estimate) -> str:
    return f"{number(estimate.low)} to {number(estimate.high)}"


def _error(error: float | None) -> str:
    return "" if error is None else f"{100 * error:.2f}%"


def _place(laws: Laws, law: Law, cell: int) -> str:
    return place(laws.place(law.cell_ids[cell]).factors)


def _constant(name: str) -> str:
    """`exponent of N`, `floor E`, `share of compute of N`."""
    if name.startswith("compute_exponent_"):
        return f"best {name[-1]} grows as compute to the power"
    kind, _, factor = name.rpartition("_")
    return f"{CONSTANTS[kind]} of {factor}" if kind in CONSTANTS else CONSTANTS[name]


def _target(law: Law, target: str) -> str:
    return f"{law.name}, {_constant(target) if 'exponent' in target else target}"
