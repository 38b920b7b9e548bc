"""Fits of scaling laws to synthetic sweeps: bias, how often intervals hold the truth, and CPU seconds.

Every trial draws new noise of 1% on a fixed design whose law is known. What a reader would do instead runs on the same
trials: percentiles of the same resamples, L-BFGS from many starts (arXiv 2203.15556, appendix D.2), and parabolas per
compute budget (the same paper, approach 2). Times are CPU seconds of one process; set OMP_NUM_THREADS=1.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table
from scipy.optimize import minimize
from scipy.stats import binomtest

from benchmarks.harness import Report
from userrep.scaling.cells import Cells
from userrep.scaling.fit import TAILS, Fit, fit_law, fit_point
from userrep.scaling.forms import PowerLaw
from userrep.scaling.solver import HUBER_DELTA, huber_loss

NOISE = 0.01
FORM = PowerLaw(("N", "D"))
LARGER = 10.0  # times the largest N and D of the design: the cell that is forecast


@dataclass(frozen=True)
class Surface:
    """L = E + A * N ** -alpha + B * D ** -beta on the places of a design.

    Attributes:
        constants: E, A, B, alpha, beta.
        places: N and D of the cells.
    """

    constants: tuple[float, float, float, float, float]
    places: dict[str, np.ndarray]

    def loss(self, places: dict[str, np.ndarray]) -> np.ndarray:
        """Without noise."""
        floor, a, b, alpha, beta = self.constants
        return floor + a * places["N"] ** -alpha + b * places["D"] ** -beta

    def truth(self) -> dict[str, float]:
        """By the names of quantities."""
        floor, _, _, alpha, beta = self.constants
        share = beta / (alpha + beta)
        return {"exponent_N": alpha, "exponent_D": beta, "compute_exponent_N": share, "irreducible_loss": floor}

    def draw(self, rng: np.random.Generator) -> Cells:
        """Cells of one sweep."""
        noise = np.exp(NOISE * rng.standard_normal(len(self.places["N"])))
        return Cells(self.places, self.loss(self.places) * noise, 6 * self.places["N"] * self.places["D"])


def isoflop() -> Surface:
    """Five budgets over four decades, five sizes each, from 1/20 to 20 times a centre that is not the best size.

    The centre is 3 times the best N at the smallest budget and the best N at the largest.
    """
    constants = (0.8, 200.0, 20.0, 0.55, 0.25)
    _, a, b, alpha, beta = constants
    budget_M = np.repeat(np.logspace(9, 13, 5), 5)
    best_M = (alpha * a / (beta * b)) ** (1 / (alpha + beta)) * (budget_M / 6) ** (beta / (alpha + beta))
    size_M = best_M * np.repeat(np.geomspace(3, 1, 5), 5) * np.tile(np.geomspace(1 / 20, 20, 5), 5)
    return Surface(constants, {"N": size_M, "D": budget_M / 6 / size_M})


def star() -> Surface:
    """N over three decades at the largest D, D over three at the largest N: 25 cells."""
    n, d = np.logspace(4, 7, 13), np.logspace(5, 8, 13)
    places = {"N": np.append(n, np.full(12, n[-1])), "D": np.append(np.full(13, d[-1]), d[:-1])}
    return Surface((0.8, 60.0, 30.0, 0.45, 0.25), places)


def rectangle() -> Surface:
    """Every N with every D, over two and a half decades each: 25 cells."""
    n, d = np.meshgrid(np.logspace(4, 6.5, 5), np.logspace(5, 7.5, 5))
    return Surface((0.5, 30.0, 60.0, 0.35, 0.28), {"N": n.ravel(), "D": d.ravel()})


def surfaces() -> dict[str, Surface]:
    """By name."""
    return {"isoflop": isoflop(), "star": star(), "rectangle": rectangle()}


@dataclass
class Study:
    """What the trials of a surface gave, by quantity; `forecast` is the loss of a cell beyond the design.

    Attributes:
        values: of every trial.
        hits: whether the interval holds the truth, of every trial.
        percentile_hits: the same of percentiles of the same resamples.
        widths: of the intervals over the truth.
        fit_s: CPU seconds of a fit with its resamples.
        point_s: CPU seconds of a fit without.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    hits: dict[str, list[bool]] = field(default_factory=dict)
    percentile_hits: dict[str, list[bool]] = field(default_factory=dict)
    widths: dict[str, list[float]] = field(default_factory=dict)
    fit_s: list[float] = field(default_factory=list)
    point_s: list[float] = field(default_factory=list)

    def add(self, name: str, truth: float, ends: tuple[float, float, float], percentiles: tuple[float, float]) -> None:
        """One interval: value, low, high."""
        value, low, high = ends
        self.values.setdefault(name, []).append(value / truth)
        self.hits.setdefault(name, []).append(low <= truth <= high)
        self.percentile_hits.setdefault(name, []).append(percentiles[0] <= truth <= percentiles[1])
        self.widths.setdefault(name, []).append((high - low) / truth)


def run_study(
    surface: Surface, num_trials: int, num_resamples: int, delta: float = HUBER_DELTA, seed: int = 0
) -> Study:
    """Fits as many sweeps as there are trials."""
    rng, study = np.random.default_rng(seed), Study()
    beyond = {name: LARGER * values.max(keepdims=True) for name, values in surface.places.items()}
    for trial in range(num_trials):
        cells = surface.draw(rng)
        study.point_s.append(cpu_s(lambda cells=cells: fit_point(FORM, cells, delta)))
        started = time.process_time()
        fit = fit_law(FORM, cells, num_resamples=num_resamples, delta=delta, seed=trial)
        estimates = fit.estimates
        study.fit_s.append(time.process_time() - started)
        for name, truth in surface.truth().items():
            found = estimates[name]
            study.add(name, truth, (found.value, found.low, found.high), percentiles(fit, name))
        low_M, high_M = fit.intervals(beyond, of_cell=True)
        measured = float(surface.loss(beyond)[0] * np.exp(NOISE * rng.standard_normal()))
        log_MK = fit.log_factors(beyond)
        drawn_R = np.exp(FORM.log_loss(fit.resampled, log_MK)[0][:, 0] + fit.errors)
        low, high = np.quantile(drawn_R, TAILS)
        study.add("forecast", measured, (fit.predict(beyond)[0], low_M[0], high_M[0]), (low, high))
    return study


def percentiles(fit: Fit, name: str) -> tuple[float, float]:
    """What most papers report as the interval of a quantity."""
    (quantity,) = [quantity for quantity in FORM.quantities(fit.centre) if quantity.name == name]
    low, high = np.quantile(quantity.at(fit.resampled)[0], TAILS)
    return quantity.to_reported(low), quantity.to_reported(high)


def cpu_s(run: Callable[[], object]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    run()
    return time.process_time() - started


def many_starts(cells: Cells, num_starts: int, seed: int = 0) -> float:
    """The least Huber loss that L-BFGS finds from random starts, over all five parameters."""
    rng = np.random.default_rng(seed)
    log_MK, log_loss_M = np.log(np.stack([cells.factors["N"], cells.factors["D"]], axis=1)), np.log(cells.loss)

    def objective(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        fitted_1M, jacobian_1MP = FORM.log_loss(theta_P[None], log_MK)
        left_M = log_loss_M - fitted_1M[0]
        slope_P = -np.clip(left_M, -HUBER_DELTA, HUBER_DELTA) @ jacobian_1MP[0]
        return float(huber_loss(left_M, HUBER_DELTA)), slope_P

    # The ranges of the grid of arXiv 2203.15556, appendix D.2: e in -1..1, a and b in 0..25, alpha and beta in 0..2.
    starts_RP = rng.uniform([-1, 0, 0, 0, 0], [1, 25, 25, 2, 2], (num_starts, 5))
    return min(float(minimize(objective, start_P, jac=True, method="L-BFGS-B").fun) for start_P in starts_RP)


def approach_2(cells: Cells) -> float:
    """Exponent of the best N in compute, from the lowest points of one parabola per budget of `isoflop`."""
    log_n_M, log_c_M = np.log(cells.factors["N"]).reshape(5, 5), np.log(6 * cells.factors["N"] * cells.factors["D"])
    best = []
    for log_n, loss in zip(log_n_M, cells.loss.reshape(5, 5), strict=True):
        curvature, slope, _ = np.polyfit(log_n, loss, 2)
        best.append(-slope / (2 * curvature))
    return float(np.polyfit(log_c_M[::5], best, 1)[0])


def show_study(report: Report, name: str, study: Study) -> None:
    """Table and JSON line of a surface."""
    table = Table("quantity", "bias", "deviation", "coverage", "of percentiles", "median width", title=name)
    for quantity, values in study.values.items():
        hits, rival = study.hits[quantity], study.percentile_hits[quantity]
        exact = binomtest(sum(hits), len(hits)).proportion_ci()
        facts = {
            "bias": float(np.mean(values)) - 1,
            "deviation": float(np.std(values)),
            "coverage": float(np.mean(hits)),
            "coverage_low": exact.low,
            "coverage_high": exact.high,
            "percentile_coverage": float(np.mean(rival)),
            "width": float(np.median(study.widths[quantity])),
        }
        shown = f"{facts['coverage']:.3f} ({exact.low:.3f} to {exact.high:.3f})"
        ends = [f"{facts['percentile_coverage']:.3f}", f"{facts['width']:.3f}"]
        table.add_row(quantity, f"{facts['bias']:+.2%}", f"{facts['deviation']:.2%}", shown, *ends)
        report.line("study", surface=name, quantity=quantity, trials=len(values), **facts)
    report.console.print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="sweeps of each surface")
    parser.add_argument("--resamples", type=int, default=1000, help="of each fit")
    parser.add_argument("--delta", type=float, default=HUBER_DELTA, help="of the Huber loss")
    parser.add_argument("--surfaces", nargs="+", default=list(surfaces()), choices=list(surfaces()))
    parser.add_argument("--starts", type=int, default=30, help="of L-BFGS, the rival")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    report = Report("scaling_fit", arguments.json, ("scipy",))
    studies = {}
    for name in arguments.surfaces:
        studies[name] = run_study(
            surfaces()[name], arguments.trials, arguments.resamples, arguments.delta, arguments.seed
        )
        show_study(report, name, studies[name])
    exponents = [(study, name) for study in studies.values() for name in ("exponent_N", "exponent_D")]
    bias = max(abs(float(np.mean(study.values[name])) - 1) for study, name in exponents)
    coverage = float(np.mean([hit for study, name in exponents for hit in study.hits[name]]))
    report.verdict("bias of exponents", bias, 0.02, "at most")
    report.verdict("coverage of intervals of exponents", coverage, 0.93, "at least")
    report.verdict("coverage of intervals of exponents", coverage, 0.97, "at most")
    report.verdict("CPU-s of a fit", max(max(study.point_s) for study in studies.values()), 0.5, "at most")
    fit_s = max(max(study.fit_s) for study in studies.values())
    report.verdict(f"CPU-s of {arguments.resamples} resamples and intervals", fit_s, 60, "at most")
    show_rivals(report, arguments)


def show_rivals(report: Report, arguments: argparse.Namespace) -> None:
    """L-BFGS from random starts, and approach 2, on sweeps of the first surface."""
    surface, rng = surfaces()["isoflop"], np.random.default_rng(arguments.seed)
    cells = surface.draw(rng)
    started = time.process_time()
    rival = many_starts(cells, arguments.starts)
    rival_s = time.process_time() - started
    centre_K, theta_P = fit_point(FORM, cells)
    log_MK = np.log(np.stack([cells.factors["N"], cells.factors["D"]], axis=1)) - centre_K
    own = float(huber_loss(np.log(cells.loss) - FORM.log_loss(theta_P[None], log_MK)[0], HUBER_DELTA)[0])
    report.verdict(
        f"Huber loss over that of L-BFGS from {arguments.starts} starts", own / rival, 1, "at most", cpu_s=rival_s
    )
    truth = surface.truth()["compute_exponent_N"]
    found = [approach_2(surface.draw(rng)) / truth - 1 for _ in range(arguments.trials)]
    report.console.print(f"approach 2: bias {np.mean(found):+.2%}, deviation {np.std(found):.2%} of compute_exponent_N")
    report.line("approach_2", bias=float(np.mean(found)), deviation=float(np.std(found)))


if __name__ == "__main__":
    main()
