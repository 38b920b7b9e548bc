"""Erases users from tables of users, and from all versions of them that a registry holds.

It is the one exception to versions that never change: number, aliases, card and origin stay, files without the users
take the place of the old ones, and the tags that vouch for the files follow. A version whose erasure is interrupted
refuses to be pulled until it is finished: the new files are complete on disk before the first one is replaced, so a
rerun goes on. Needs pyarrow only (no numpy, no torch).
"""

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from mlflow import MlflowClient
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from userrep.erasure.replace import Erased, Rewriter, Rewritten, changes, erase_files, keep, with_lineage
from userrep.erasure.rewriters import erase_rows, filter_parquet
from userrep.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    describe_file,
    read_manifest,
    sha256_file,
    write_manifest,
)
from userrep.publishing.card import CARD_NAME, render_card
from userrep.publishing.client import opened
from userrep.publishing.connection import TRANSFER_LIMITS, connect
from userrep.publishing.entity import USER
from userrep.publishing.inputs import INPUTS_NAME
from userrep.publishing.quality import KEY_COLUMN, QUALITY_NAME, user_key
from userrep.publishing.table import write_part
from userrep.publishing.verify import EMBEDDING_KINDS, PART_NAME, content_sha256, part_entries
from userrep.publishing.versions import TableVersion, list_versions, table_names

ERASED_TAG = "userrep.erased"  # on a version: how many users it has lost, and when last
ERASED_FACT = "erased"  # users that a table has lost since it was made
RECORD = "record.json"  # of a pending version: what its erasure changes
KIND = EMBEDDING_KINDS[USER.table]
OnVersion = Callable[[TableVersion, Rewritten], None]


def erase_user_table(directory: Path, staging: Path, manifest: Manifest, ids: pa.Array) -> Erased | None:
    """Eraser of tables of users: parts, digests of inputs, quality by user. What else lies there, an index, goes."""
    known = [entry for entry in manifest.files if entry.path != CARD_NAME and _is_known(entry.path)]
    files, num_rows = erase_files(directory, staging, known, ids, _rewriter)
    if not num_rows:
        return None
    files = tuple(_described(staging, entry, old) for entry, old in zip(files, known, strict=True))
    parts = part_entries(manifest.model_copy(update={"files": files}))
    rows = sum(entry.rows or 0 for entry in parts)
    lost = manifest.facts["rows"] - rows
    facts = {
        **manifest.facts,
        "rows": rows,
        "table_sha256": content_sha256(parts),
        ERASED_FACT: manifest.facts.get(ERASED_FACT, 0) + lost,
    }
    (staging / CARD_NAME).write_text(render_card(facts, USER))
    entries = (*files, describe_file(staging, staging / CARD_NAME))
    return Erased(manifest.model_copy(update={"files": entries, "facts": facts}), num_rows)


def erase_from_quality(source: Path, target: Path, ids: pa.Array) -> int:
    """Rewriter of quality by user, which names users by a hash."""
    return filter_parquet(source, target, KEY_COLUMN, pa.array(map(user_key, ids.to_pylist()), pa.int64()))


def erase_versions(
    ids: pa.Array,
    *,
    tracking_uri: str,
    scratch: Path,
    on_open: Callable[[TableVersion, Path], None],
    on_done: OnVersion,
    verbose: bool = False,
) -> list[TableVersion]:
    """Erases users from every version of every table of users; what an interrupted attempt has begun is finished first.

    Uploads that never became a version are deleted: publishing again makes them anew.

    Args:
        ids: of the users, strings.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        scratch: where new files wait until they are in their place; the same in a rerun.
        on_open: called with every version and the directory of its files as they are.
        on_done: called when a version is without the users, where it had some.
        verbose: let MLflow log.

    Returns:
        All versions that there are, as they were before.

    Raises:
        TableMismatchError: a version is not what was published; nothing of it was changed.
        RegistryError: MLflow could not be reached or refused; a rerun goes on.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    versions = user_versions(tracking_uri, verbose)
    for version in versions:
        pending = scratch / f"{version.name}-v{version.version}"
        if pending.exists():  # made for the users of an earlier attempt
            _finish(version, pending, tracking_uri, on_done, verbose)
            version = next(
                v for v in list_versions(version.name, tracking_uri=tracking_uri) if v.version == version.version
            )
        with opened(version, tracking_uri=tracking_uri, scratch=scratch, verbose=verbose) as directory:
            on_open(version, directory)
            is_changed = _prepare(directory, pending, ids)
        if is_changed:
            _finish(version, pending, tracking_uri, on_done, verbose)
    with connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose) as client:
        _delete_unregistered(client, tracking_uri)
    return versions


def user_versions(tracking_uri: str, verbose: bool = False) -> list[TableVersion]:
    """All versions of all tables of users whose files are there."""
    with connect(tracking_uri, verbose=verbose) as client:
        names = table_names(client, (KIND,))
    return [one for name in names for one in list_versions(name, tracking_uri=tracking_uri, verbose=verbose)]


def _is_known(path: str) -> bool:
    return path in (CARD_NAME, QUALITY_NAME) or bool(PART_NAME.fullmatch(path) or INPUTS_NAME.fullmatch(path))


def _rewriter(path: str) -> Rewriter:
    if PART_NAME.fullmatch(path):
        return _erase_part
    return erase_rows if INPUTS_NAME.fullmatch(path) else erase_from_quality if path == QUALITY_NAME else keep


def _erase_part(source: Path, target: Path, ids: pa.Array) -> int:
    column = USER.id_column
    is_gone = pc.is_in(pq.read_table(source, columns=[column])[column], value_set=ids)
    if not (num_gone := pc.sum(is_gone).as_py() or 0):
        return 0
    write_part(target.parent, int(target.stem.removeprefix("part-")), pq.read_table(source).filter(pc.invert(is_gone)))
    return num_gone


def _described(staging: Path, entry: FileEntry, old: FileEntry) -> FileEntry:
    """The entry of a part has its range of ids too; what rounding has cost was measured when it was made."""
    if entry is old or not PART_NAME.fullmatch(entry.path):
        return entry
    ids = pq.read_table(staging / entry.path, columns=[USER.id_column])[USER.id_column]
    bounds = {"min_id": ids[0].as_py(), "max_id": ids[-1].as_py()} if len(ids) and old.min_id is not None else {}
    return entry.model_copy(update={**bounds, "quantisation": old.quantisation})


def _prepare(directory: Path, pending: Path, ids: pa.Array) -> bool:
    """Makes the files of a version that change; `pending` appears when all of them are there."""
    staging = pending.with_name(f".{pending.name}.staging")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "files").mkdir(parents=True)
    manifest = read_manifest(directory)
    erased = erase_user_table(directory, staging / "files", manifest, ids)
    if erased is None:
        shutil.rmtree(staging)
        return False
    new = with_lineage(erased.manifest, manifest)
    write_manifest(staging / "files", new)
    record = {
        "num_rows": erased.num_rows,
        "files": changes(manifest, new),
        "old_digest": manifest.digest(),
        "new_digest": new.digest(),
    }
    (staging / RECORD).write_text(json.dumps(record))
    os.replace(staging, pending)
    return True


def _finish(version: TableVersion, pending: Path, tracking_uri: str, on_done: OnVersion, verbose: bool) -> None:
    """Puts the new files in their place, and then the tags that vouch for them."""
    files, record = pending / "files", json.loads((pending / RECORD).read_text())
    manifest, number = read_manifest(files), str(version.version)
    changed = tuple((path, old, new) for path, old, new in record["files"])
    with connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose) as client:
        client.log_model_artifacts(version.model_id, str(files))
        repository = get_artifact_repository(version.location, tracking_uri=tracking_uri)
        for path, _, new in changed:
            if new is None:
                repository.delete_artifacts(path)
        checksums = {
            KIND.identity: manifest.facts[KIND.identity],
            "manifest_sha256": sha256_file(files / MANIFEST_NAME),
        }
        lost, day = manifest.facts[ERASED_FACT], datetime.now(UTC).date().isoformat()
        tags = {
            **checksums,
            "size_bytes": str(sum(entry.size_bytes for entry in manifest.files)),
            **KIND.tags_of(manifest.facts),
            ERASED_TAG: f"{lost} user{'' if lost == 1 else 's'}, the last on {day}",
        }
        client.set_logged_model_tags(version.model_id, checksums)
        for key, value in tags.items():
            client.set_model_version_tag(version.name, number, key, value)
        client.update_model_version(version.name, number, KIND.describe(manifest.facts))
    on_done(version, Rewritten(record["num_rows"], changed, record["old_digest"], record["new_digest"]))
    shutil.rmtree(pending)


def _delete_unregistered(client: MlflowClient, tracking_uri: str) -> None:
    """Deletes the files of uploads that no version refers to: those of an interrupted publish."""
    known = {
        found.tags.get("model_id")
        for name in table_names(client, tuple(EMBEDDING_KINDS.values()))
        for found in client.search_model_versions(f"name='{name}'")
    }
    experiments = [found.experiment_id for found in client.search_experiments()]
    for experiment in experiments:
        for model in client.search_logged_models([experiment], f"model_type = '{KIND.model_type}'"):
            if model.model_id in known or model.tags.get(KIND.identity) == "deleted":
                continue
            repository = get_artifact_repository(model.artifact_location, tracking_uri=tracking_uri)
            for found in repository.list_artifacts():
                repository.delete_artifacts(found.path)
            client.set_logged_model_tags(model.model_id, {KIND.identity: "deleted"})
