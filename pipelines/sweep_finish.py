"""The end of a sweep: fits, report, and what MLflow is told of them."""

import time
from contextlib import closing
from pathlib import Path

from pipelines.console import Console
from pipelines.mlflow_store import tracking_uri
from pipelines.sweep import Outcome
from pipelines.sweep_plan import SweepPlan
from pipelines.sweep_report import summary_text, write_sweep_report
from userrep.config import ConfigError
from userrep.publishing.connection import TRANSFER_LIMITS, RegistryError, connect
from userrep.scaling.drift import compare_laws
from userrep.scaling.records import FIT_NAME, Laws
from userrep.training.replay import send_run
from userrep.training.tracking import SPOOL_NAME, MetricSpool, SpoolReader

REPORT = "report"  # directory in the working directory of a sweep


def earlier_fit(workdir: Path | None) -> Path | None:
    """Where an earlier sweep has its fit.

    Raises:
        ConfigError: it has none.
    """
    if workdir is None:
        return None
    path = workdir / REPORT / FIT_NAME
    if not path.is_file():
        raise ConfigError(
            f"--compare-with {workdir}: there is no {path}; name the --workdir of a sweep that was fitted"
        )
    return path


def finish(plan: SweepPlan, outcome: Outcome, workdir: Path, earlier: Path | None, console: Console) -> str:
    """Writes the report of a sweep and tells MLflow of it. Returns what the report says, in a few lines.

    Args:
        plan: of the sweep.
        outcome: what has been run.
        workdir: of the sweep.
        earlier: fit of an earlier one, to compare with.
        console: for messages.
    """
    before = None if earlier is None else Laws.load(earlier)
    laws = write_sweep_report(outcome.runs, workdir / REPORT, plan.config.name, earlier)
    console.say(f"report: {workdir / REPORT / 'report.html'}")
    _spool(plan.directory, laws)
    try:
        run_id = send_run(plan.directory, tracking_uri(workdir), waits=True).run_id
        with connect(tracking_uri(workdir), limits=TRANSFER_LIMITS) as client:
            client.log_artifacts(run_id, str(workdir / REPORT), REPORT)
    except RegistryError as error:
        console.say(f"sweep: MLflow does not have the report ({error}); run the same command again when it answers")
    return summary_text(laws, None if before is None else compare_laws(before, laws))


def _spool(directory: Path, laws: Laws) -> None:
    """What may be quoted of the laws, as metrics of the sweep's run; every fit that says something new is a step."""
    metrics = {"cells/finished": float(laws.facts.num_finished), "cells/failed": float(laws.facts.num_failed)}
    for law in laws.laws:
        for estimate in law.with_floor.estimates:
            if estimate.is_stated:
                metrics[f"fit/{law.name}/{estimate.name}".replace("(", "_").replace(")", "").replace(", ", "_")] = (
                    estimate.value
                )
    points = SpoolReader(directory / SPOOL_NAME).read()
    if points and points[-1]["metrics"] == metrics:
        return
    with closing(MetricSpool(directory / SPOOL_NAME)) as spool:
        spool.write(points[-1]["step"] + 1 if points else 0, time.time_ns() // 1_000_000, metrics)
