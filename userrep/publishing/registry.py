"""Publishes tables, embedding tables unless another kind is said, as versions of an MLflow registered model.

Order of the steps, each of which may be the last one before a crash: LoggedModel (PENDING) -> files -> READY -> metrics
-> registered model -> version -> alias. The alias moves last, so a reader sees the old table or the complete new one.
Every step first looks for what an earlier attempt left, so a rerun goes on where that stopped and makes no duplicate.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from userrep.manifest import MANIFEST_NAME, sha256_file
from userrep.publishing.aliases import point_alias
from userrep.publishing.connection import TABLE_TAG, WRITE_LIMITS, RegistryError, connect
from userrep.publishing.kind import TableKind
from userrep.publishing.runs import finish_run
from userrep.publishing.upload import FORCED_TAG, Beside, Request, make_version
from userrep.publishing.verify import embedding_kind

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # LoggedModel names allow no . : / % or quotes; @ and / part references
ALIAS = re.compile(r"(?!latest$|v\d+$)[A-Za-z0-9_-]+", re.IGNORECASE)  # MLflow keeps the excluded ones for itself
METRIC_KEY = re.compile(
    r"[\w\-. /:]+", re.ASCII
)  # MLflow rejects others, e.g. `@` and brackets, but only at the server


@dataclass(frozen=True)
class Published:
    """A published version and the alias that points to it."""

    name: str
    version: int
    alias: str
    model_id: str  # MLflow LoggedModel that holds the files
    table_sha256: str  # identity of the content, `TableKind.identity`


def publish(
    table_dir: Path,
    name: str,
    alias: str,
    *,
    tracking_uri: str,
    experiment: str,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    artifact_root: Path | None = None,
    kind: TableKind | None = None,
    beside: Beside | None = None,
    verbose: bool = False,
) -> Published:
    """Makes a verified local table a new version of `name` and points `alias` to it.

    A table that is already a version of `name` (same `kind.identity`) gets no second one: only the alias moves. Do not
    publish to one name from two processes at once: MLflow has no lock, so each could make a version.

    Args:
        table_dir: a committed table of the kind; it is verified first.
        name: letters, digits, `_` and `-`.
        alias: letters, digits, `_` and `-`; not `latest`, and no version number such as `v3`.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        experiment: name of the experiment; created if it does not exist.
        run_id: run that made the table; it is left as it is. None makes a run and ends it.
        metrics: finite figures of this table, e.g. `val/recall_at_10`.
        tags: added to the version.
        artifact_root: where a new experiment in a local database keeps its files; by default `mlartifacts` beside a
            sqlite database. An existing experiment and a server keep their own.
        kind: of the table; None for an embedding table, of users or of items as its manifest states.
        beside: what a release adds to a new version; see `release.release`, which also asks the gate.
        verbose: let MLflow log and print.

    Raises:
        IncompleteTableError: the table is damaged or not committed; nothing was published.
        RegistryError: bad argument, or the registry could not be reached or refused; the alias is where it was.
    """
    _check_names(name, alias)
    kind = kind or embedding_kind(Path(table_dir))
    _check_labels(metrics or {}, tags or {}, kind)
    manifest = kind.verify(Path(table_dir))
    manifest_sha256 = sha256_file(Path(table_dir) / MANIFEST_NAME)
    request = Request(
        kind, Path(table_dir), name, manifest, manifest_sha256, metrics or {}, tags or {}, tracking_uri, verbose, beside
    )
    with connect(tracking_uri, create=True, verbose=verbose) as client:
        version = _existing_version(client, request)
    if version is None:
        version = make_version(request, experiment, run_id, artifact_root)
    with connect(tracking_uri, limits=WRITE_LIMITS, verbose=verbose) as client:
        finish_run(client, version.run_id, "FINISHED")
        for key, value in (beside.tags if beside else {}).items():
            if key.startswith(FORCED_TAG):  # a version that existed already has no such tag yet
                client.set_model_version_tag(name, str(version.version), key, value)
        point_alias(client, name, alias, int(version.version))
    return Published(name, int(version.version), alias, version.tags["model_id"], request.table_sha256)


def check_free(name: str, alias: str, *, tracking_uri: str, kind: TableKind, verbose: bool = False) -> None:
    """Checks, before hours of work, that `publish` could make a version of this name.

    Raises:
        RegistryError: a name or an alias that cannot be, a name that holds another kind, or no registry.
    """
    _check_names(name, alias)
    with connect(tracking_uri, create=True, verbose=verbose) as client:
        _holds(client, name, kind)


def move_alias(name: str, alias: str, version: int, *, tracking_uri: str, verbose: bool = False) -> int | None:
    """Points an alias to an existing version, ungated. Returns the version that it pointed to before.

    Raises:
        RegistryError: there is no such table or version; the alias is where it was.
    """
    with connect(tracking_uri, limits=WRITE_LIMITS, verbose=verbose) as client:
        client.get_model_version(name, str(version))
        return point_alias(client, name, alias, version)


def _existing_version(client: MlflowClient, request: Request) -> ModelVersion | None:
    """The version that already has this content; refuses a name that belongs to another kind of model."""
    if not _holds(client, request.name, request.kind):
        return None
    wanted = f"name='{request.name}' and tags.{request.kind.identity}='{request.table_sha256}'"
    versions = client.search_model_versions(wanted, max_results=1, order_by=["version_number DESC"])
    return versions[0] if versions else None


def _holds(client: MlflowClient, name: str, kind: TableKind) -> bool:
    """Whether there is a registered model of this name, which then must be of the kind."""
    try:
        registered = client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False
    if registered.tags.get(TABLE_TAG) != kind.name:
        raise RegistryError(f"registered model {name!r} exists and holds no {kind.plural}; choose another name")
    return True


def _check_names(name: str, alias: str) -> None:
    if not NAME.fullmatch(name):
        raise RegistryError(f"table name {name!r}: use letters, digits, _ and -, starting with a letter or digit")
    if not ALIAS.fullmatch(alias):
        raise RegistryError(
            f"alias {alias!r}: use letters, digits, _ and -, but not `latest` and no version such as v3"
        )


def _check_labels(metrics: Mapping[str, float], tags: Mapping[str, str], kind: TableKind) -> None:
    """Finds before the upload what MLflow would refuse after it."""
    for key, value in metrics.items():
        if not METRIC_KEY.fullmatch(key) or not math.isfinite(value):
            raise RegistryError(
                f"metric {key!r} = {value!r}: the value must be finite, the key of letters, digits, spaces and _-./:"
            )
    if reserved := sorted(set(tags) & {kind.identity, "manifest_sha256", "model_id", *kind.tags}):
        raise RegistryError(f"tags {', '.join(reserved)} are set by publish itself; choose other names")
