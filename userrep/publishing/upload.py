"""Uploads a table as an MLflow LoggedModel and makes it a version of a registered model.

Facts of MLflow 3.17.2 behind the details:

- `create_model_version(source="models:/<model_id>")` on a database store looks the model up at the process-wide
  tracking URI, not the client's (and creates `mlflow.db` in the working directory if none is set): a database store
  gets the artifact location as source instead, which is what it would have stored as download location.
- `mlflow.register_model` silently registers another LoggedModel of the same name: never used.
- A version does not keep the model id it was created with (REST and SQL): it is a tag.
- Repeating a metric point with the same timestamp and step adds nothing: the timestamp is the model's creation time.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from userrep.manifest import Manifest
from userrep.publishing.connection import TABLE_TAG, TRANSFER_LIMITS, WRITE_LIMITS, RegistryError, connect, is_database
from userrep.publishing.kind import TableKind
from userrep.publishing.runs import experiment_of, finish_run, open_run

FORCED_TAG = "userrep.forced."  # + alias, on a version: who moved the alias to it against the gate, and what it said
PREVIOUS_TAG = "userrep.previous"  # version that the map leads to
UNMAPPED_TAG = "userrep.unmapped"  # why there is no map
FILES_TAG = "userrep.release"  # JSON: file in the folder `release` -> sha256
REPORT_NAME = "gate.json"  # in the folder `release`
BESIDE = "release"  # folder of a version's files that its manifest does not list


@dataclass(frozen=True)
class Beside:
    """What a release adds to a version beside its table: files in the folder `release`, and tags that vouch for it."""

    directory: Path
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """What one call of `publish` is about; constant over its steps."""

    kind: TableKind
    table_dir: Path
    name: str
    manifest: Manifest
    manifest_sha256: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    tracking_uri: str
    verbose: bool
    beside: Beside | None = None

    @property
    def table_sha256(self) -> str:
        """Identity of the content."""
        return self.manifest.facts[self.kind.identity]


def make_version(request: Request, experiment: str, run_id: str | None, artifact_root: Path | None) -> ModelVersion:
    """Uploads the files and registers them as a new version; goes on where an interrupted attempt stopped.

    Args:
        request: what to publish.
        experiment: name of the experiment; created if it does not exist.
        run_id: run to record under, left as it is; None makes one (or takes that of the interrupted attempt).
        artifact_root: where a new experiment in a local database keeps its files.

    Raises:
        RegistryError: MLflow could not be reached or refused. A run that was made here is marked FAILED.
    """
    with connect(request.tracking_uri, limits=WRITE_LIMITS, create=True, verbose=request.verbose) as client:
        experiment_id = experiment_of(client, experiment, run_id, request.tracking_uri, artifact_root)
        model = _earlier_model(client, request, experiment_id)
        run_id = run_id or open_run(
            client, experiment_id, f"publish {request.name}", model.source_run_id if model else None
        )
    try:
        with connect(request.tracking_uri, limits=TRANSFER_LIMITS, verbose=request.verbose) as client:
            model = _ready_model(client, request, model, experiment_id, run_id)
            if request.beside:  # also where an earlier attempt has done so: against another version, perhaps
                client.log_model_artifacts(model.model_id, str(request.beside.directory), BESIDE)
        with connect(request.tracking_uri, limits=WRITE_LIMITS, verbose=request.verbose) as client:
            for key, value in request.metrics.items():
                client.log_metric(
                    run_id, key, value, timestamp=model.creation_timestamp, step=0, model_id=model.model_id
                )
            return _register(client, request, model, run_id)
    except BaseException:
        # The first error is the one to report, also when the server is gone.
        with contextlib.suppress(RegistryError), connect(request.tracking_uri, verbose=request.verbose) as client:
            finish_run(client, run_id, "FAILED")
        raise


def _ready_model(
    client: MlflowClient, request: Request, model: LoggedModel | None, experiment_id: str, run_id: str
) -> LoggedModel:
    """The LoggedModel with all files in it. READY is its commit point: an unfinished one is filled again."""
    if model is None:
        model = client.create_logged_model(
            experiment_id,
            name=request.name,
            source_run_id=run_id,
            model_type=request.kind.model_type,
            params=request.kind.params_of(request.manifest.facts),
            tags={request.kind.identity: request.table_sha256, "manifest_sha256": request.manifest_sha256},
        )
    if model.status != LoggedModelStatus.READY:
        client.log_model_artifacts(model.model_id, str(request.table_dir))
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def _register(client: MlflowClient, request: Request, model: LoggedModel, run_id: str) -> ModelVersion:
    facts = request.manifest.facts
    with contextlib.suppress(MlflowException):  # it exists already; anything else makes the next request fail
        client.create_registered_model(request.name, tags={TABLE_TAG: request.kind.name})
    own_tags = {
        request.kind.identity: request.table_sha256,
        # Of the files that were uploaded: an earlier attempt may have finished a table whose facts differ from these.
        "manifest_sha256": model.tags["manifest_sha256"],
        "model_id": model.model_id,
        "size_bytes": str(sum(entry.size_bytes for entry in request.manifest.files)),
        **request.kind.tags_of(facts),
        **(request.beside.tags if request.beside else {}),
    }
    return client.create_model_version(
        request.name,
        source=model.artifact_location if is_database(request.tracking_uri) else model.model_uri,
        run_id=run_id,
        model_id=model.model_id,
        tags={**request.tags, **own_tags},
        description=request.kind.describe(facts),
    )


def _earlier_model(client: MlflowClient, request: Request, experiment_id: str) -> LoggedModel | None:
    """What an interrupted attempt left: a finished upload of this content, or an unfinished one of these very files."""
    found = client.search_logged_models([experiment_id], f"tags.{request.kind.identity}='{request.table_sha256}'")
    models = [model for model in found if model.name == request.name]
    ready = [model for model in models if model.status == LoggedModelStatus.READY]
    pending = [
        model
        for model in models
        if model.status == LoggedModelStatus.PENDING and model.tags.get("manifest_sha256") == request.manifest_sha256
    ]
    return next(iter([*ready, *pending]), None)
