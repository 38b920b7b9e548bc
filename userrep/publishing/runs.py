"""The experiment and the run that a publication is recorded under."""

from pathlib import Path
from urllib.parse import unquote

from mlflow import MlflowClient

from userrep.publishing.connection import RegistryError, is_database, redacted

OWN_RUN_TAG = "userrep.run"  # marks runs that publish made itself, the only ones whose status it changes
OWN_RUN = "publish"


def experiment_of(
    client: MlflowClient, experiment: str, run_id: str | None, tracking_uri: str, artifact_root: Path | None
) -> str:
    """Id of the experiment; creates it if there is none of this name.

    Raises:
        RegistryError: it is deleted, it is not the experiment of the run, or a new one has no place for its files.
    """
    if run_id is not None:
        actual = client.get_experiment(client.get_run(run_id).info.experiment_id)
        if actual.name != experiment:
            raise RegistryError(
                f"run {run_id} belongs to experiment {actual.name!r}, not {experiment!r}: pass that name"
            )
        return actual.experiment_id
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return client.create_experiment(experiment, artifact_location=_artifact_location(tracking_uri, artifact_root))
    if found.lifecycle_stage != "active":
        raise RegistryError(f"experiment {experiment!r} is deleted: restore it or choose another name")
    return found.experiment_id


def open_run(client: MlflowClient, experiment_id: str, run_name: str, earlier: str | None) -> str:
    """Id of a run to record under: that of an earlier attempt, else a new one."""
    if earlier is None:
        return client.create_run(experiment_id, run_name=run_name, tags={OWN_RUN_TAG: OWN_RUN}).info.run_id
    if client.get_run(earlier).data.tags.get(OWN_RUN_TAG) == OWN_RUN:
        client.update_run(earlier, status="RUNNING")
    return earlier


def finish_run(client: MlflowClient, run_id: str | None, status: str) -> None:
    """Ends a run that `open_run` made; leaves every other run, and one that has this status already, as it is."""
    if not run_id:
        return
    run = client.get_run(run_id)
    if run.data.tags.get(OWN_RUN_TAG) == OWN_RUN and run.info.status != status:
        client.set_terminated(run_id, status)


def _artifact_location(tracking_uri: str, artifact_root: Path | None) -> str | None:
    """Where a new experiment keeps files: a server decides; a database's own default is the working directory."""
    if not is_database(tracking_uri):
        return None
    if artifact_root is None:
        if not tracking_uri.startswith("sqlite"):
            raise RegistryError(f"a new experiment in the database {redacted(tracking_uri)} needs artifact_root")
        artifact_root = Path(unquote(tracking_uri.partition("///")[2].partition("?")[0])).parent / "mlartifacts"
    return artifact_root.absolute().as_uri()
