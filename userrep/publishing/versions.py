"""Which tables and versions a registry holds, and which version a reference means now."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from userrep.publishing.connection import TABLE_TAG, RegistryError, UnknownTableError, UnknownVersionError, connect
from userrep.publishing.kind import TableKind
from userrep.publishing.verify import EMBEDDING_KINDS

REFERENCE = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]*)(?:@[vV](?P<v>\d+)|/(?P<number>\d+)|@(?P<alias>[A-Za-z0-9_-]+))"
)
DELETED_TAG = "userrep.deleted"  # on a version whose files are gone; the maps that lie beside them stay


@dataclass(frozen=True)
class TableVersion:
    """One immutable version of a published table, as the registry describes it."""

    name: str
    version: int
    aliases: tuple[str, ...]  # that point to this version now
    table_sha256: str  # identity of the content, `TableKind.identity`
    manifest_sha256: str
    model_id: str  # MLflow LoggedModel that holds the files
    location: str  # artifact URI of the files
    tags: Mapping[str, str]
    created_ms: int  # unix milliseconds


@dataclass(frozen=True)
class TableSummary:
    """One published table: its newest version and where the aliases point."""

    name: str
    latest_version: int | None
    aliases: Mapping[str, int]


def resolve(reference: str, *, tracking_uri: str, kind: TableKind | None = None, verbose: bool = False) -> TableVersion:
    """Looks up which version a reference means now.

    Args:
        reference: `name@alias`, `name@v12` or `name/12`.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        kind: of the table; None for an embedding table, of users or of items.
        verbose: let MLflow log.

    Raises:
        RegistryError: malformed reference, or a version that `publish` did not make.
        UnknownTableError: lists close names.
        UnknownVersionError: lists the aliases and versions that exist.
    """
    match = REFERENCE.fullmatch(reference)
    if match is None:
        raise RegistryError(f"reference {reference!r} is not of the form name@alias, name@v12 or name/12")
    name, alias, number = match["name"], match["alias"], match["v"] or match["number"]
    kinds = tuple(EMBEDDING_KINDS.values()) if kind is None else (kind,)
    one = kinds[0]  # kinds of embedding tables have the same identity, noun and publisher
    with connect(tracking_uri, verbose=verbose) as client:
        try:
            found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
        except MlflowException as error:
            # A missing name and version are RESOURCE_DOES_NOT_EXIST, a missing alias is INVALID_PARAMETER_VALUE.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise _not_found(client, name, reference, kinds) from error
        if DELETED_TAG in found.tags:
            raise UnknownVersionError(
                f"{name} version {found.version} was deleted ({found.tags[DELETED_TAG]}): take one of "
                f"`userrep tables list {name}`"
            )
        if one.identity not in found.tags or "manifest_sha256" not in found.tags:
            raise RegistryError(f"{name} version {found.version} is no {one.noun}: `{one.publisher}` did not make it")
        return _described(client, found, found.aliases, one.identity)


def list_versions(
    name: str, *, tracking_uri: str, with_deleted: bool = False, verbose: bool = False
) -> list[TableVersion]:
    """All versions of a published embedding table, the oldest first.

    Args:
        name: of the table.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        with_deleted: also those whose files `userrep tables gc` has deleted; their `table_sha256` is empty.
        verbose: let MLflow log.

    Raises:
        UnknownTableError: lists close names.
    """
    kinds = tuple(EMBEDDING_KINDS.values())
    with connect(tracking_uri, verbose=verbose) as client:
        try:
            registered = client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise _not_found(client, name, name, kinds) from error
        aliases = dict[str, list[str]]()  # a search leaves them out
        for alias, number in registered.aliases.items():
            aliases.setdefault(str(number), []).append(alias)
        versions, token, is_last = list[TableVersion](), None, False
        while not is_last:
            page = client.search_model_versions(f"name='{name}'", order_by=["version_number ASC"], page_token=token)
            versions += [
                _described(client, found, aliases.get(str(found.version), []), kinds[0].identity)
                for found in page
                if "manifest_sha256" in found.tags and (with_deleted or DELETED_TAG not in found.tags)
            ]
            token, is_last = page.token, not page.token
    return sorted(versions, key=lambda version: version.version)


def list_tables(*, tracking_uri: str, verbose: bool = False) -> list[TableSummary]:
    """Lists the published embedding tables, of users and of items, by name.

    Raises:
        RegistryError: the server or database cannot be read.
    """
    with connect(tracking_uri, verbose=verbose) as client:
        summaries = []
        for name in table_names(client, tuple(EMBEDDING_KINDS.values())):
            newest = client.search_model_versions(f"name='{name}'", max_results=1, order_by=["version_number DESC"])
            aliases = {alias: int(number) for alias, number in client.get_registered_model(name).aliases.items()}
            summaries.append(TableSummary(name, int(newest[0].version) if newest else None, aliases))
        return summaries


def table_names(client: MlflowClient, kinds: Sequence[TableKind]) -> list[str]:
    """Names of all registered models that hold tables of the kinds, sorted; inside a `connect` block."""
    names = []
    for kind in kinds:  # the filter of a search has no `or`
        token, is_last = None, False
        while not is_last:
            page = client.search_registered_models(f"tags.`{TABLE_TAG}` = '{kind.name}'", page_token=token)
            names += [model.name for model in page]
            token, is_last = page.token, not page.token
    return sorted(names)


def _described(client: MlflowClient, found: ModelVersion, aliases: Sequence[str], identity: str) -> TableVersion:
    return TableVersion(
        name=found.name,
        version=int(found.version),
        aliases=tuple(sorted(aliases)),
        table_sha256=found.tags.get(identity, ""),
        manifest_sha256=found.tags["manifest_sha256"],
        model_id=found.tags.get("model_id", ""),
        location=client.get_model_version_download_uri(found.name, str(found.version)),
        tags=dict(found.tags),
        created_ms=found.creation_timestamp,
    )


def _not_found(client: MlflowClient, name: str, reference: str, kinds: Sequence[TableKind]) -> RegistryError:
    names = table_names(client, kinds)
    if name not in names:
        close = difflib.get_close_matches(name, names, n=5, cutoff=0.4) or names[:5]
        hint = f"; did you mean {', '.join(close)}?" if close else "; nothing has been published there yet"
        return UnknownTableError(f"there is no published {kinds[0].noun} {name!r}{hint}")
    aliases = client.get_registered_model(name).aliases
    newest = client.search_model_versions(f"name='{name}'", max_results=20, order_by=["version_number DESC"])
    known = ", ".join(f"@{alias} (v{number})" for alias, number in sorted(aliases.items())) or "none"
    versions = ", ".join(f"v{version.version}" for version in newest) or "none"
    return UnknownVersionError(
        f"{reference!r} does not exist. Aliases of {name}: {known}; versions, newest first: {versions}"
    )
