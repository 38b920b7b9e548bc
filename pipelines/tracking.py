"""Runs of a working directory and MLflow: while one trains, after MLflow was away, and when a table is published."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.mlflow_store import tracking_uri
from userrep import storage
from userrep.mirror import shown
from userrep.publishing.connection import RegistryError, check_uri, connect, redacted
from userrep.training.fence import patiently
from userrep.training.follower import Follower
from userrep.training.log_pieces import receive_log
from userrep.training.replay import RunBusyError, find_run, living_job, send_run
from userrep.training.run_record import RECORD_NAME, RunRecord
from userrep.training.tracking import SPOOL_NAME

if TYPE_CHECKING:  # `userrep sync-tracking` starts without torch and ray
    from pipelines.job import Job

RUNS = "runs"
# The run of an experiment before those below it.
RUN_PLACES = (f"{RUNS}/*", "continual/*", "continual/*/cells/*", "sweep", "sweep/cells/*")


@contextmanager
def tracked(job: "Job", run_dir: Path, config: dict[str, Any]) -> Iterator[None]:
    """Sends a run to MLflow while the block runs; MLflow delays neither its start nor its end.

    Args:
        job: says what it must about MLflow on its console.
        run_dir: of the run.
        config: resolved config of the run.

    Raises:
        RegistryError: the tracking URI can never work; that MLflow does not answer is no error.
    """
    uri = tracking_uri(job.workdir)
    check_uri(uri, create=True)
    with living_job(run_dir):
        record = RunRecord.start(run_dir, job.config.publish.experiment, config)
        follower = Follower(run_dir, uri)
        status = "FAILED"
        try:
            yield
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            ended = record.model_copy(update={"status": status})
            reason = follower.finish(status)
            patiently(lambda: ended.write(run_dir))
            if reason is not None:
                job.console.say(
                    f"pretrain: MLflow does not have all metrics ({reason}); "
                    f"they are in {shown(run_dir)}, and "
                    f"`userrep sync-tracking --workdir {shown(job.workdir)}` sends the rest"
                )


def sync(workdir: Path, uri: str) -> Iterator[tuple[bool, str]]:
    """Sends to MLflow what it lacks of every run of a working directory; doing it again is harmless.

    Yields:
        Of each run: whether MLflow has everything now, and a line that says so.

    Raises:
        RegistryError: there is no run.
    """
    storage.receive(workdir, *(f"{place}/{RECORD_NAME}" for place in RUN_PLACES))
    run_dirs = [path.parent for place in RUN_PLACES for path in sorted(workdir.glob(f"{place}/{RECORD_NAME}"))]
    if not run_dirs:
        raise RegistryError(f"there is no run in {shown(workdir)}: pass the --workdir of the job that has trained")
    for run_dir in run_dirs:
        receive_log(run_dir / SPOOL_NAME)
        try:
            sent = send_run(run_dir, uri, waits=False)
        except RunBusyError as error:
            yield False, f"{error}"
        except RegistryError as error:
            yield False, f"run {run_dir.name}: {error}"
        else:
            what = f"sent {sent.num_values:,} values" if sent.num_values else "nothing was missing"
            yield True, f"run {run_dir.name}: {what}, {sent.status} as {sent.run_id} at {redacted(uri)}"


def run_id_of(job: "Job", name: str, key: str) -> str:
    """Id in MLflow of a run that this job has trained; sends the run there first where it is missing.

    Args:
        job: whose MLflow is meant.
        name: of the run directory.
        key: of its record.

    Raises:
        RegistryError: MLflow does not have the run and does not take it.
    """
    uri, run_dir = tracking_uri(job.workdir), job.workdir / RUNS / name
    try:
        with connect(uri, create=True) as client:
            run_id = find_run(client, job.config.publish.experiment, key)
        storage.refresh(run_dir / RECORD_NAME)
        if run_id is None and (run_dir / RECORD_NAME).is_file():
            receive_log(run_dir / SPOOL_NAME)
            job.console.say(f"publish: sending training run {name} to MLflow first")
            run_id = send_run(run_dir, uri, waits=True).run_id  # its job's own process may be about to
    except RegistryError as error:
        raise RegistryError(
            f"a table is published under its training run ({name}), which could not be found in MLflow: {error}. "
            f"When MLflow answers, `userrep sync-tracking --workdir {shown(job.workdir)}` sends the run; then publish "
            "again"
        ) from error
    if run_id is None:
        raise RegistryError(
            f"training run {name} is not in MLflow, and {shown(run_dir)}, from which it could be sent, is gone: "
            f"remove {shown(job.workdir / 'encoder')} and train again, or set MLFLOW_TRACKING_URI to the MLflow that "
            "has it"
        )
    return run_id
