"""Runs that count as running in MLflow although their job is dead: nobody was left to end them."""

from collections.abc import Iterator
from dataclasses import dataclass

from mlflow import MlflowClient

from userrep.training.replay import HEARTBEAT_S, HEARTBEAT_TAG
from userrep.training.run_record import RUNNING

# Assumption: clocks differ by less, and a server is away for less. A job that was only cut off from MLflow for longer
# sets its run to RUNNING again with its next heartbeat.
SILENCE_LIMIT_S = 10 * HEARTBEAT_S
PAGE = 1000


@dataclass(frozen=True)
class LostRun:
    """A run without a sign of life; `last_beat_s` is unix seconds."""

    run_id: str
    name: str
    last_beat_s: int


def find_lost_runs(client: MlflowClient, now_s: float) -> list[LostRun]:
    """Runs of this project, in any experiment, that are RUNNING with an old heartbeat; inside a `connect` block.

    Args:
        client: of the MLflow to look at.
        now_s: the time, unix seconds.
    """
    wanted = f"attributes.status = '{RUNNING}' and tags.`{HEARTBEAT_TAG}` LIKE '%'"
    experiments = [experiment.experiment_id for experiment in _pages(client.search_experiments)]
    lost = []
    for run in _pages(lambda **page: client.search_runs(experiments, wanted, **page)) if experiments else ():
        last_beat_s = int(run.data.tags[HEARTBEAT_TAG])
        if now_s - last_beat_s > SILENCE_LIMIT_S:
            lost.append(LostRun(run.info.run_id, run.info.run_name, last_beat_s))
    return lost


def end_lost_run(client: MlflowClient, run: LostRun) -> None:
    """Sets a run to KILLED, at the time of its last sign of life; inside a `connect` block."""
    client.set_terminated(run.run_id, "KILLED", end_time=1000 * run.last_beat_s)


def _pages(search) -> Iterator:
    token = None
    while True:
        page = search(max_results=PAGE, page_token=token)
        yield from page
        if not (token := page.token):
            return
