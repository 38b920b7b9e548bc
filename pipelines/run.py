"""The main job: all stages in order, then `summary.json` and `report.html`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from pipelines import embed, evaluate, ingest, pretrain, publish, teach, tokenize
from pipelines.config import JobConfig
from pipelines.job import Job
from pipelines.mlflow_store import tracking_uri
from pipelines.report import REPORT_NAME, write_report
from pipelines.session import PeakMemory, ray_session
from pipelines.summary import summarize
from userrep import storage
from userrep.config import ConfigError
from userrep.manifest import write_json

CONFIG_NAME, SUMMARY_NAME = "config.json", "summary.json"


class Stage(NamedTuple):
    """A stage and the table that it writes."""

    run: Callable[..., None]
    table: str


# In the order of their inputs. `pull` is no stage: it writes outside the job, wherever a user wants the table.
STAGES = {
    "ingest": Stage(ingest.run, ingest.TABLE),
    "tokenize": Stage(tokenize.run, tokenize.TABLE),
    "pretrain": Stage(pretrain.run, pretrain.TABLE),
    "teach": Stage(teach.run, teach.TABLE),
    "evaluate": Stage(evaluate.run, evaluate.TABLE),
    "embed": Stage(embed.run, embed.TABLE),
    "publish": Stage(publish.run, publish.TABLE),
}


def stages_of(config: JobConfig) -> dict[str, Stage]:
    """The stages of a job: `teach` where it has tasks."""
    return {name: stage for name, stage in STAGES.items() if name != "teach" or config.teach.questions}


def run_stage(job: Job, stage: str, **options: Any) -> None:
    """Runs one stage, with the options that it alone has; its inputs must be there.

    Raises:
        ConfigError: the job has no tasks to teach.
    """
    if stage not in stages_of(job.config):
        raise ConfigError("teach.questions is empty: name at least one label or service that is to be taught")
    _open_workdir(job)
    with ray_session(job.console.is_verbose):
        STAGES[stage].run(job, **options)


def run(job: Job) -> dict[str, object]:
    """Runs every stage that is not complete yet, pulls the table back, and writes the summary and the report."""
    _open_workdir(job)
    write_json(job.workdir / CONFIG_NAME, job.config.model_dump(mode="json"))
    started = time.perf_counter()
    with PeakMemory() as memory, ray_session(job.console.is_verbose):
        for name, stage in stages_of(job.config).items():
            stage.run(job)
            if name == "ingest":
                teach.check_tasks(job)
        pull_started = time.perf_counter()
        pulled = publish.run_pull(job)
        pulled["seconds"] = round(time.perf_counter() - pull_started, 3)
    summary = summarize(job, pulled, memory, time.perf_counter() - started)
    write_json(job.workdir / SUMMARY_NAME, summary)
    write_report(job, summary)
    storage.send(job.workdir, CONFIG_NAME, SUMMARY_NAME, REPORT_NAME)
    return summary


def _open_workdir(job: Job) -> None:
    """Makes the working directory; what cannot be written to, or has no MLflow, is known before anything is computed.

    Raises:
        ConfigError: object storage holds no database, and no MLflow server is named.
        ObjectStoreError: it was not reached, or refused.
    """
    tracking_uri(job.workdir)
    storage.check(job.workdir)
    job.workdir.mkdir(parents=True, exist_ok=True)
