"""From a sweep with several learning rates to the ladder's rule."""

from math import inf
from pathlib import Path

from pipelines.sweep_status import read_status
from userrep.scaling.learning_rate import RateFit, RateTrial, fit_rate_rule
from userrep.scaling.rules import RateRule


def fit_rates(workdir: Path, measured_in: str) -> RateFit:
    """Fits the rule to the finished cells of a sweep; those that diverged count as infinitely bad.

    Raises:
        ValueError: the best rate of a width and batch is at an end of those that were tried, or the widths and batches
            cannot tell one from the other.
    """
    rows, _ = read_status(workdir)
    trials = [
        RateTrial(
            row["dim"],
            row["batch_size"],
            row["learning_rate"],
            row["embedding_learning_rate"],
            row["loss"] if row["status"] == "finished" else inf,
        )
        for row in rows
        if row["status"] == "finished" or row["message"].startswith("diverged")
    ]
    return fit_rate_rule(trials, RateRule(), measured_in)
