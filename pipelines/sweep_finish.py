"""The end of a sweep: fits, report, and what MLflow is told of them."""

from pathlib import Path

from pipelines.console import Console
from pipelines.sweep import Outcome
from pipelines.sweep_plan import SweepPlan


def finish(plan: SweepPlan, outcome: Outcome, workdir: Path, compare_with: Path | None, console: Console) -> str:
    """Writes the report of a sweep. Returns what it says, in a few lines."""
    return f"{outcome.runs.num_rows} cells"
