"""Deletes the files of versions that nobody will ask for again, and leaves what later versions need of them.

A deleted version stays as a record without its table: the map to the version before it lies beside it still, so that a
vector of today can be turned into the space of a version that is kept, however many between them are gone.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from userrep.publishing.aliases import HISTORY_TAG, history_of
from userrep.publishing.connection import TRANSFER_LIMITS, connect
from userrep.publishing.upload import BESIDE
from userrep.publishing.verify import EMBEDDING_KINDS
from userrep.publishing.versions import DELETED_TAG, TableVersion, list_versions

DELETING = "its deletion was interrupted: run `userrep tables gc` again"
DAY_MS = 86_400_000
IDENTITY = next(iter(EMBEDDING_KINDS.values())).identity


@dataclass(frozen=True)
class Verdict:
    """What retention does with a version, and why."""

    version: TableVersion
    is_deleted: bool
    reason: str


def retention_plan(
    name: str, *, keep_last: int, older_than_days: float, tracking_uri: str, verbose: bool = False
) -> list[Verdict]:
    """What `collect` would do with each version of a table, the oldest first.

    A version is deleted if it is older than `older_than_days`, not among the `keep_last` newest ones, no alias points
    to it, and no alias would by a rollback.

    Raises:
        UnknownTableError: there is no such table.
        ValueError: a limit is negative.
    """
    if keep_last < 0 or older_than_days < 0:
        raise ValueError(f"keep_last {keep_last} and older_than_days {older_than_days}: both must be >= 0")
    versions = list_versions(name, tracking_uri=tracking_uri, with_deleted=True, verbose=verbose)
    kept = [version.version for version in versions if DELETED_TAG not in version.tags]
    with connect(tracking_uri, verbose=verbose) as client:
        targets = _rollback_targets(client, name, kept)
    newest = set(kept[len(kept) - min(keep_last, len(kept)) :])
    plan = []
    for version in versions:
        days = (time.time() * 1000 - version.created_ms) / DAY_MS
        if DELETED_TAG in version.tags:
            if version.tags[DELETED_TAG] == DELETING:
                plan.append(Verdict(version, True, "its deletion was interrupted"))
        elif version.aliases:
            plan.append(Verdict(version, False, f"alias {', '.join(version.aliases)}"))
        elif version.version in targets:
            plan.append(Verdict(version, False, f"a rollback of {', '.join(targets[version.version])} goes there"))
        elif version.version in newest:
            plan.append(Verdict(version, False, f"among the last {keep_last}"))
        elif days < older_than_days:
            plan.append(Verdict(version, False, f"{days:.1f} days old"))
        else:
            plan.append(Verdict(version, True, f"{days:.1f} days old, no alias"))
    return plan


def collect(plan: Sequence[Verdict], *, tracking_uri: str, verbose: bool = False) -> list[int]:
    """Deletes the files of the versions that the plan deletes. Returns their numbers.

    Interrupted, a version is already refused to readers, and the next plan goes on with it.

    Raises:
        RegistryError: MLflow could not be reached or refused; the versions before that are deleted.
    """
    doomed = [verdict.version for verdict in plan if verdict.is_deleted]
    for version in doomed:
        number = str(version.version)
        with connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose) as client:
            client.set_model_version_tag(version.name, number, DELETED_TAG, DELETING)
            # Without its identity, the same table published again is a new version rather than this one.
            if IDENTITY in version.tags:
                client.set_logged_model_tags(version.model_id, {IDENTITY: "deleted"})
                client.delete_model_version_tag(version.name, number, IDENTITY)
            files = get_artifact_repository(version.location, tracking_uri=tracking_uri)
            for found in files.list_artifacts():
                if found.path != BESIDE:
                    files.delete_artifacts(found.path)
            day = datetime.now(UTC).date().isoformat()
            client.set_model_version_tag(version.name, number, DELETED_TAG, f"{day} by retention")
    return [version.version for version in doomed]


def _rollback_targets(client: MlflowClient, name: str, kept: Sequence[int]) -> dict[int, list[str]]:
    """By version the aliases whose next rollback ends there."""
    registered = client.get_registered_model(name)
    targets = dict[int, list[str]]()
    for alias, current in registered.aliases.items():
        earlier = [one for one in history_of(registered.tags, alias) if one in kept and one != int(current)]
        if HISTORY_TAG + alias in registered.tags and earlier:
            targets.setdefault(earlier[-1], []).append(alias)
    return targets
