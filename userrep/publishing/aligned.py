"""Pulls a version in the space of another one, by the rotations that lie beside the versions between the two.

Each version has a map to the one before it; a chain of them, and of their inverses, leads from any version to any other
that has a common ancestor. Needs numpy: `pip install 'userrep[tables]'`.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from userrep.manifest import (
    IncompleteTableError,
    Manifest,
    contained_path,
    read_manifest,
    sha256_file,
    staged_directory,
)
from userrep.publishing.alignment import MAP_NAME, AlignmentError, Map, read_maps
from userrep.publishing.client import PulledTable, TableMismatchError, fetch_file, held_table, opened
from userrep.publishing.connection import TRANSFER_LIMITS, connect
from userrep.publishing.entity import ENTITIES
from userrep.publishing.pairs import matrix
from userrep.publishing.rows import vector_columns
from userrep.publishing.table import finish_table, write_part
from userrep.publishing.upload import BESIDE, FILES_TAG, PREVIOUS_TAG, UNMAPPED_TAG
from userrep.publishing.verify import DERIVED_FACTS, OPTIONAL_FACTS, TASKS_FACT, part_entries, schema_of, verify_table
from userrep.publishing.versions import TableVersion, list_versions, resolve
from userrep.schema import TASK_COLUMN_PREFIX, VECTOR_COLUMN

ALIGNED_FACT = "aligned"
DTYPE = "float32"  # of a turned copy, whatever the version has: nothing is rounded a second time


@dataclass(frozen=True)
class Step:
    """A map from one version to another, of each column that both have."""

    source: int
    target: int
    maps: dict[str, Map]


def pull_aligned(reference: str, to: Path, aligned_to: str, *, tracking_uri: str, verbose: bool = False) -> PulledTable:
    """Pulls a version with its vectors in the space of another version of the same table.

    The copy is a table of float32 with a manifest of its own, whose fact `aligned` says from which version and through
    which maps it came, with the loss of each. Columns that a version on the way lacks are left out.

    Args:
        reference: `name@alias`, `name@v12` or `name/12`.
        to: as in `client.pull`.
        aligned_to: `v12`, or an alias of the same table.
        tracking_uri: address of the MLflow server, or an absolute database URI.
        verbose: let MLflow log.

    Raises:
        AlignmentError: no chain of maps leads there, e.g. as widths differ.
        RegistryError: a version does not exist.
        TableMismatchError: as `client.pull`.
    """
    to = Path(to).absolute()
    version = resolve(reference, tracking_uri=tracking_uri, verbose=verbose)
    wanted = f"v{aligned_to}" if aligned_to.isdigit() else aligned_to
    target = resolve(f"{version.name}@{wanted}", tracking_uri=tracking_uri, verbose=verbose)
    steps = chain(version, target.version, tracking_uri=tracking_uri, verbose=verbose)
    fact = {
        "from_version": version.version,
        "to_version": target.version,
        "manifest_sha256": version.manifest_sha256,
        "steps": [_described(step) for step in steps],
    }
    if (found := _sound_copy(to, fact)) is not None:
        return PulledTable(to, found, version)
    with (
        staged_directory(to) as staging,
        tempfile.TemporaryDirectory(dir=to.parent, prefix=f".{to.name}.") as scratch,
        opened(version, tracking_uri=tracking_uri, scratch=Path(scratch), verbose=verbose) as source,
    ):
        try:
            manifest = _turned(source, staging, steps, fact)
        except BaseException:
            shutil.rmtree(staging)
            raise
    return PulledTable(to, manifest, version)


def chain(version: TableVersion, target: int, *, tracking_uri: str, verbose: bool = False) -> list[Step]:
    """The maps from a version to another one, in order: down to their common ancestor, and up from there.

    Raises:
        AlignmentError: there is no such chain; says at which version it ends, and why.
        TableMismatchError: a map is not the one that was published.
    """
    known = {
        one.version: one
        for one in list_versions(version.name, tracking_uri=tracking_uri, with_deleted=True, verbose=verbose)
    }
    down, up = _ancestry(version.version, known), _ancestry(target, known)
    meeting = next((number for number in down if number in up), None)
    if meeting is None:
        raise AlignmentError(
            f"no chain of maps leads from version {version.version} of {version.name} to version {target}: versions "
            f"{down[-1]} and {up[-1]} have no map to one before them. Retrain on the new version, or pull one that has"
        )
    with connect(tracking_uri, limits=TRANSFER_LIMITS, verbose=verbose), tempfile.TemporaryDirectory() as folder:
        steps = [
            [_step(known[number], Path(folder), tracking_uri) for number in path[: path.index(meeting)]]
            for path in (down, up)
        ]
    back = [
        Step(step.target, step.source, {name: one.inverse() for name, one in step.maps.items()})
        for step in reversed(steps[1])
    ]
    return [*steps[0], *back]


def _ancestry(number: int, known: dict[int, TableVersion]) -> list[int]:
    """A version, the one before it, and so on to the first."""
    path = [number]
    while path[-1] in known and (before := known[path[-1]].tags.get(PREVIOUS_TAG)):
        if not before.isdigit() or int(before) not in known or int(before) in path:
            break
        path.append(int(before))
    return path


def _step(version: TableVersion, folder: Path, tracking_uri: str) -> Step:
    """The maps of a version to the one before it; inside a `connect` block."""
    what = f"version {version.version} of {version.name}"
    if reason := version.tags.get(UNMAPPED_TAG):
        raise AlignmentError(f"{what} has no map to version {version.tags[PREVIOUS_TAG]}: {reason}")
    try:
        path = fetch_file(version, f"{BESIDE}/{MAP_NAME}", folder / str(version.version), tracking_uri=tracking_uri)
        stated = json.loads(version.tags.get(FILES_TAG, "{}"))[MAP_NAME]
    except (IncompleteTableError, ValueError, KeyError, TypeError) as error:
        raise TableMismatchError(f"the map of {what} cannot be had: {error}") from error
    if (actual := sha256_file(path)) != stated:
        raise TableMismatchError(f"the map of {what} has sha256 {actual}, published was {stated}")
    return Step(version.version, int(version.tags[PREVIOUS_TAG]), {one.column: one for one in read_maps(path)})


def _described(step: Step) -> dict[str, Any]:
    figures = {
        name: {"mean_cosine": one.mean_cosine, "unmapped_cosine": one.unmapped_cosine, "held_out": one.held_out}
        for name, one in step.maps.items()
    }
    return {"from": step.source, "to": step.target, "columns": figures}


def _composed(steps: list[Step], columns: list[str], dim: int) -> dict[str, np.ndarray]:
    """One map (D, D) for each column that all steps have, float64."""
    composed = {name: np.eye(dim) for name in columns if all(name in step.maps for step in steps)}
    for step in steps:
        composed = {name: map_DD @ step.maps[name].matrix for name, map_DD in composed.items()}
    return composed


def _sound_copy(to: Path, fact: dict[str, Any]) -> Manifest | None:
    """The manifest of a copy at `to` that was turned by these very maps; refuses what a pull must not replace."""
    held = held_table(to)
    if held is None or held.facts.get(ALIGNED_FACT) != fact:
        return None
    try:
        return verify_table(to)
    except IncompleteTableError:
        return None


def _turned(source: Path, target: Path, steps: list[Step], fact: dict[str, Any]) -> Manifest:
    """Writes the table of `source` to `target`, its vectors turned, part by part."""
    manifest = read_manifest(source)
    entity, facts = ENTITIES[manifest.table], manifest.facts
    maps = _composed(steps, vector_columns(schema_of(manifest)), facts["dim"])
    if VECTOR_COLUMN not in maps:
        raise AlignmentError(f"the maps on the way are of {', '.join(maps) or 'no column'}, not of {VECTOR_COLUMN!r}")
    tasks = [task for task in facts.get(TASKS_FACT, []) if TASK_COLUMN_PREFIX + task in maps]
    schema = entity.schema(facts["dim"], DTYPE, tasks)
    parts = []
    for entry in part_entries(manifest):
        bucket = int(entry.path.removeprefix("part-").removesuffix(".parquet"))
        rows = pq.read_table(contained_path(source, entry.path))
        columns = [
            _turned_column(rows, name, maps[name]) if name in maps else rows[name].combine_chunks()
            for name in schema.names
        ]
        parts.append(write_part(target, bucket, pa.Table.from_arrays(columns, schema=schema), entity))
    space = f"Vectors were turned into the space of version {fact['to_version']} from that of {fact['from_version']}."
    kept = {key: value for key, value in facts.items() if key not in (*DERIVED_FACTS, *OPTIONAL_FACTS, TASKS_FACT)}
    for key in ("task_kinds", "task_scores"):
        if key in kept:
            kept[key] = {task: value for task, value in kept[key].items() if task in tasks}
    return finish_table(
        target,
        parts=parts,
        dim=facts["dim"],
        dtype=DTYPE,
        tasks=tasks,
        facts={**kept, ALIGNED_FACT: fact, "limits": [*kept.get("limits", []), space]},
        config=manifest.config,
        inputs={"table": manifest.digest()},
        entity=entity,
    )


def _turned_column(rows: pa.Table, name: str, map_DD: np.ndarray) -> pa.FixedSizeListArray:
    turned_ND = matrix(rows, name) @ map_DD.astype(np.float32)
    turned_ND /= np.linalg.norm(turned_ND, axis=1, keepdims=True)
    return pa.FixedSizeListArray.from_arrays(pa.array(turned_ND.ravel()), len(map_DD))
