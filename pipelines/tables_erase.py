"""Users go from a working directory and from all versions in a registry, and a scan proves it."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.config import ConfigError
from userrep.data.erase import erase_shards
from userrep.erasure.log import ErasureLog, read_log
from userrep.erasure.replace import (
    Erased,
    Eraser,
    Rewriter,
    Rewritten,
    erase_files,
    erase_table,
    interrupted,
    keep,
    recover,
    with_lineage,
)
from userrep.erasure.rewriters import USER_COLUMN, erase_lines, erase_rows
from userrep.erasure.scan import Scan, scan
from userrep.manifest import MANIFEST_NAME, Manifest, read_manifest, write_manifest
from userrep.publishing.client import opened
from userrep.publishing.entity import USER
from userrep.publishing.erase import erase_from_quality, erase_user_table, erase_versions, user_versions
from userrep.publishing.quality import QUALITY_NAME

ERASURE = "erasure"  # directory of log and key in a working directory
LOG = f"{ERASURE}/log.jsonl"
NOT_TABLES = {ERASURE, "mlartifacts", "runs"}
MAX_DEPTH = 3  # of a table below the working directory


class StillThereError(ValueError):
    """The scan at the end has found an erased user."""


@dataclass(frozen=True)
class Erasure:
    """What an erasure has done.

    Attributes:
        rewritten: tables and versions that had any of the users, by name.
        unknown: users that are nowhere, and that no earlier erasure in this log has found.
        scan: of all files at the end.
    """

    rewritten: dict[str, Rewritten]
    unknown: tuple[str, ...]
    scan: Scan


def run(ids: Sequence[str], workdir: Path, uri: str, *, verbose: bool = False) -> Erasure:
    """Erases users; killed at any point, the same call goes on. No stage may run in the working directory meanwhile.

    Args:
        ids: of the users.
        workdir: of the job; a path without links.
        uri: of the registry; a local database that does not exist is left out.
        verbose: let MLflow log.

    Raises:
        StillThereError: a file holds an id after all; the log says which.
        IncompleteTableError: a table is damaged; repair or delete it, then run this again.
        RegistryError: MLflow could not be reached or refused; what came before is done.
    """
    if not workdir.is_dir():
        raise ConfigError(f"there is no directory {workdir}: give the --workdir of a job")
    log, values = ErasureLog(workdir / ERASURE, ids), pa.array(ids, pa.string())
    rewritten: dict[str, Rewritten] = {}

    def before(name: str, directory: Path) -> None:
        if users := _users_in(directory, values):  # before they go: a rerun must know that they were there
            log.append("found", sorted(users), table=name)

    def after(name: str, what: Rewritten | None) -> None:
        if what is not None:
            log.append("erased", table=name, **{**asdict(what), "files": what.files})
            rewritten[name] = what

    with log.alone():
        log.append("started")
        _clear(workdir)
        for directory in tables_in(workdir):
            name = directory.relative_to(workdir).as_posix()
            before(name, directory)
            after(name, erase_table(directory, values, _eraser(directory)))
        _erase_loose_lines(workdir, values)
        if has_registry(uri):
            _erase_published(workdir, uri, values, before, after, verbose)
        result = scan(_managed_files(workdir, uri, verbose), values)
        names = [str(path) for path in result.found]
        log.append("failed" if names else "proved", num_files=result.num_files, num_raw=result.num_raw, found=names)
        shutil.rmtree(workdir / ERASURE / "pending", ignore_errors=True)
    if names:
        raise StillThereError(f"{len(names)} files still hold an erased id, the first is {names[0]}; see {log.path}")
    known = {one for record in read_log(log.path) if record["event"] == "found" for one in record["users"]}
    unknown = tuple(one for one in ids if log.pseudonym(one) not in known)
    return Erasure(rewritten, unknown, result)


def tables_in(workdir: Path) -> list[Path]:
    """Directories of all committed tables of a working directory, those of runs and of the registry left out."""
    found = [path.parent for depth in range(1, MAX_DEPTH + 1) for path in workdir.glob("*/" * depth + MANIFEST_NAME)]
    return sorted(
        path
        for path in found
        if not any(part in NOT_TABLES or part.startswith(".") for part in path.relative_to(workdir).parts)
    )


def has_registry(uri: str) -> bool:
    """Whether there is one: a local database appears with the first training run."""
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///").partition("?")[0]).exists()


def _eraser(directory: Path) -> Eraser:
    kind = read_manifest(directory).table
    if kind in ("shards", "shards_text"):
        return erase_shards
    return erase_user_table if kind == USER.table else _erase_other


def _erase_other(directory: Path, staging: Path, manifest: Manifest, ids: pa.Array) -> Erased | None:
    """Eraser of all other tables: rows of Parquet files that have a column of users, or quality by user."""
    files, num_rows = erase_files(directory, staging, manifest.files, ids, _rewriter)
    return Erased(manifest.model_copy(update={"files": files}), num_rows) if num_rows else None


def _rewriter(path: str) -> Rewriter:
    if Path(path).name == QUALITY_NAME:
        return erase_from_quality
    return erase_rows if path.endswith(".parquet") else erase_lines if path.endswith(".jsonl") else keep


def _users_in(directory: Path, ids: pa.Array) -> set[str]:
    """Those of the users who have a row in a table."""
    found = set[str]()
    for path in directory.rglob("*.parquet"):
        if USER_COLUMN in pq.read_schema(path).names:
            column = pq.read_table(path, columns=[USER_COLUMN])[USER_COLUMN]
            found |= set(pc.unique(column.filter(pc.is_in(column, value_set=ids))).to_pylist())
    return found


def _clear(workdir: Path) -> None:
    """Ends what killed erasures have left, and removes what killed stages have: a stage begins anew in any case."""
    for directory in interrupted(workdir, MAX_DEPTH):
        recover(directory)
    for suffix in ("staging", "superseded"):
        for left in workdir.glob(f".*.{suffix}"):
            shutil.rmtree(left)


def _erase_loose_lines(workdir: Path, ids: pa.Array) -> None:
    """Records in quarantine of an ingest that was refused: they belong to no table."""
    for path in sorted((workdir / "quarantine").glob("*.jsonl")):
        temporary = path.with_name(f".{path.name}.tmp")
        if erase_lines(path, temporary, ids):
            os.replace(temporary, path)


def _erase_published(
    workdir: Path,
    uri: str,
    ids: pa.Array,
    before: Callable[[str, Path], None],
    after: Callable[[str, Rewritten | None], None],
    verbose: bool,
) -> None:
    """Erases users from all versions, and lets the job's own record of what it has published follow."""
    erase_versions(
        ids,
        tracking_uri=uri,
        scratch=workdir / ERASURE / "pending",
        on_open=lambda version, directory: before(f"{version.name}@v{version.version}", directory),
        on_done=lambda version, what: after(f"{version.name}@v{version.version}", what),
        verbose=verbose,
    )
    now = {(one.name, one.version): one.table_sha256 for one in user_versions(uri, verbose)}
    for directory in tables_in(workdir):
        manifest = read_manifest(directory)
        if manifest.table != "published":
            continue
        sha256 = now.get((manifest.facts["name"], manifest.facts["version"]), manifest.facts["sha256"])
        if sha256 != manifest.facts["sha256"]:
            new: dict[str, Any] = {**manifest.facts, "sha256": sha256}
            write_manifest(directory, with_lineage(manifest.model_copy(update={"facts": new}), manifest))


def _managed_files(workdir: Path, uri: str, verbose: bool) -> Iterator[Path]:
    """Files of all tables, loose ones beside them, and those of all versions."""
    yield from (path for path in sorted(workdir.iterdir()) if path.is_file() and path.suffix in (".json", ".html"))
    for directory in [*tables_in(workdir), workdir / "quarantine"]:
        yield from (path for path in sorted(directory.rglob("*")) if path.is_file())
    if has_registry(uri):
        for version in user_versions(uri, verbose):
            with opened(version, tracking_uri=uri, scratch=workdir / ERASURE, verbose=verbose) as directory:
                yield from (path for path in sorted(directory.rglob("*")) if path.is_file())
