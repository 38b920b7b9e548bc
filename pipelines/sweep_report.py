"""The report of a sweep: fitted laws, answers in words and figures on one page that needs no other file."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from pipelines.report import inline_svg
from pipelines.sweep_tables import constant_rows, fact_rows, forecast_rows, form_rows, next_rows, residual_rows
from userrep.scaling.answers import answer_questions
from userrep.scaling.drift import Drift, compare_laws
from userrep.scaling.laws import fit_laws
from userrep.scaling.plot_style import STYLE
from userrep.scaling.plots import draw_figures
from userrep.scaling.records import FIT_NAME, Laws
from userrep.scaling.wording import duration

REPORT_NAME, FIGURES = "report.html", "figures"
DPI = 200  # of PNG files, for print
NUM_RESAMPLES = 1000
WORST = 3  # residuals of a law that are shown at once
# What a reader has to know of a figure; others speak for themselves.
CAPTIONS = {
    "loss_compute": (
        "Every marker is a place of the design. The step is the frontier of the cells with the center's history "
        "length, to which L(C) is fitted. Held-out cells are circled; the bar is the 95% interval of a run there by a "
        "fit without them. Grey lines are losses on the way, at a constant learning rate; nothing is fitted to them."
    ),
    "factors": (
        "The other factors are held at the center (star). The dotted line is the fitted floor of the arm, which holds "
        "what the other factors leave; the band is the 95% interval of the law, without the noise of a run."
    ),
    "isoflop": (
        "Cells of one colour cost the same. Laws are fitted by L(N, D) and not by these parabolas, whose lowest points "
        "are biased on wide grids."
    ),
    "learning_rates": (
        "Percent above the lowest loss of the same model and batch. Laws use the best learning rate of each place."
    ),
    "downstream": "Loss of a probe on the frozen user vector. Intervals of rank correlations are of a bootstrap.",
    "exponents": (
        "A grey exponent must not be quoted, for the reason beside it. Intervals are cut where they leave the frame."
    ),
}


def write_sweep_report(
    runs: pa.Table,
    directory: Path,
    name: str,
    earlier: Path | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Laws:
    """Fits the laws of a sweep and writes `fit.json`, `figures/*.svg`, `figures/*.png` and `report.html`.

    Args:
        runs: of the schema RUNS; may hold no finished cell, and the report then says what cannot be said.
        directory: is made; files of those names are replaced, figures that are no longer drawn are removed.
        name: of the sweep, for people.
        earlier: `fit.json` of an earlier sweep to compare with.
        num_resamples: of every interval; under 200, their ends are noisy.

    Raises:
        ValueError: columns are missing, or `earlier` is not a `fit.json`.
    """
    before = None if earlier is None else Laws.load(earlier)  # `earlier` may be the file that is replaced
    laws = fit_laws(runs, num_resamples=num_resamples)
    drift = None if before is None else compare_laws(before, laws)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    laws.save(directory / FIT_NAME)
    with matplotlib.rc_context(STYLE):
        figures = list(draw_figures(runs, laws))
        _save_figures(figures, directory / FIGURES)
        drawn = [(name, inline_svg(figure, name, spoken), CAPTIONS[name]) for name, figure, spoken in figures]
    page = _render(laws, drift, drawn, name)
    temporary = directory / f".{REPORT_NAME}.{os.getpid()}.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, directory / REPORT_NAME)
    return laws


def summary_text(laws: Laws, drift: Drift | None = None) -> str:
    """What a terminal shows at the end: counts, stated exponents, answers, and the most informative next cell."""
    facts = laws.facts
    lines = [
        f"{facts.sweep or 'sweep'}: {facts.num_finished} cells finished, {facts.num_failed} failed, "
        f"{facts.num_planned} planned; {facts.decades:.1f} decades of compute, {facts.flops:.2g} FLOPs, "
        f"{duration(facts.hours)}",
        *facts.left_out,
    ]
    for law in laws.laws:
        stated = [str(one) for one in law.with_floor.estimates if one.is_stated and "exponent" in one.name]
        lines += [f"{law.name}: {one}" for one in stated]
    for answer in answer_questions(laws):
        lines += [answer.question, f"  {answer.text}"]
    best = next_rows(laws)
    lines += [f"Next cell for {row['target']}: {row['place']}, {row['price']}, {row['cut']}" for row in best[:2]]
    return "\n".join(lines + ([str(drift)] if drift is not None else [])) + "\n"


def _save_figures(figures: list[tuple[str, Figure, str]], directory: Path) -> None:
    for old in [*directory.glob("*.svg"), *directory.glob("*.png")]:
        if old.stem in CAPTIONS and old.stem not in {name for name, _, _ in figures}:
            old.unlink()
    for name, figure, _ in figures:
        figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
        figure.savefig(directory / f"{name}.png", dpi=DPI, metadata={"Software": None})


def _render(laws: Laws, drift: Drift | None, figures: list[tuple[str, Markup, str]], name: str) -> str:
    environment = Environment(loader=PackageLoader("pipelines", "."), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("sweep_report.html.j2").render(_context(laws, drift, figures, name))


def _context(laws: Laws, drift: Drift | None, figures: list[tuple[str, Markup, str]], name: str) -> dict[str, Any]:
    answers, facts = answer_questions(laws), laws.facts
    answered = sum(answer.is_answered for answer in answers)
    return {
        "name": name,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "laws": laws,
        "facts": facts,
        "headline": f"{answered} of {len(answers)} questions answered by {facts.num_finished} finished cells",
        "tiles": _tiles(laws),
        "answers": answers,
        "figures": figures,
        "constants": constant_rows(laws),
        "refused": [(law.name, law.refusal) for law in laws.laws if law.refusal is not None],
        "forms": form_rows(laws),
        "forecasts": forecast_rows(laws),
        "unforecast": [
            (law.name, law.forecast_refusal) for law in laws.laws if not law.refusal and law.forecast_refusal
        ],
        "residuals": residual_rows(laws),
        "worst": WORST,
        "next": next_rows(laws),
        "drift": drift,
        "run": fact_rows(laws),
    }


def _tiles(laws: Laws) -> list[tuple[str, str]]:
    facts = laws.facts
    return [
        ("cells finished", str(facts.num_finished)),
        ("failed / planned", f"{facts.num_failed} / {facts.num_planned}"),
        ("decades of compute", f"{facts.decades:.1f}"),
        ("FLOPs", f"{facts.flops:.2g}"),
        ("time", duration(facts.hours)),
    ]
