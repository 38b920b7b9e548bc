"""A finished cell as one table: what is published of it, pulled elsewhere, and gone on from there.

It holds the directories of all lessons as they were committed, so that it lends them as the cell itself does
(`borrowing.py`); and the encoder table that the backbone is made from, if there is one, in `encoder/`.
"""

import shutil
from pathlib import Path

from userrep.manifest import (
    MANIFEST_NAME,
    IncompleteTableError,
    Manifest,
    contained_path,
    describe_file,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.publishing.kind import TableKind
from userrep.publishing.verify import content_sha256, unlisted_files
from userrep.training.cells import Cell, lesson_directory, num_taught, read_cell

CELL_TABLE = "continual_model"
ENCODER = "encoder"  # directory of the encoder table
FACTS = ("cell_sha256", "label", "method", "seed", "order", "config_hash", "scores")


def write_cell_table(source: Path, cell: Cell, directory: Path) -> Manifest:
    """Commits the table of a finished cell; what the cell has left stays as it is.

    Args:
        source: directory of the cell.
        cell: what it is of, with the path of its encoder.
        directory: of the table.

    Raises:
        IncompleteTableError: the cell is not finished, damaged, or another one; or its encoder is.
    """
    result = read_cell(source)
    if not result.is_complete or result.cell.identity() != cell.identity():
        raise IncompleteTableError(
            f"{source} holds {num_taught(result.lessons)} tasks of a cell with order {list(result.cell.order)}, and "
            f"{list(cell.order)} with the settings of this command are needed: finish the cell first"
        )
    last_numbers = [num_taught(result.lessons[:end]) - 1 for end in range(1, len(result.lessons) + 1)]
    parts = [lesson_directory(source, number) for number in last_numbers]
    encoder = cell.training.backbone.encoder
    with staged_directory(directory) as staging:
        for part in parts:
            _copy_table(part, staging / part.name)
        if encoder is not None:
            path = encoder.pinned().path
            assert path is not None
            _copy_table(path, staging / ENCODER)
        files = tuple(describe_file(staging, path) for path in sorted(staging.rglob("*")) if path.is_file())
        final = result.lessons[-1]
        facts = {
            "cell_sha256": content_sha256(files),
            "label": cell.label,
            "method": cell.method,
            "seed": cell.seed,
            "order": list(cell.order),
            "config_hash": cell.content_hash(),
            "scores": {f"{name}/{final.metrics[name]}": score for name, score in final.scores.items()},
        }
        inputs = read_manifest(parts[-1]).inputs
        manifest = Manifest(
            table=CELL_TABLE, stage="continual", config=cell.identity(), inputs=inputs, files=files, facts=facts
        )
        write_manifest(staging, manifest)
    return manifest


def read_cell_table(directory: Path) -> Manifest:
    """Reads the manifest and checks that it describes a finished cell, without touching the other files.

    Raises:
        IncompleteTableError: no manifest, another kind of table, a file outside the directory, or facts that
            contradict the listed files.
    """
    manifest = read_manifest(directory)
    if manifest.table != CELL_TABLE:
        raise IncompleteTableError(f"{directory} holds a table of kind {manifest.table!r}, wanted {CELL_TABLE!r}")
    if lacking := [key for key in FACTS if key not in manifest.facts]:
        raise IncompleteTableError(f"manifest of {directory} lacks the facts {', '.join(lacking)}; publish it again")
    for entry in manifest.files:
        contained_path(directory, entry.path)
    if (stated := manifest.facts["cell_sha256"]) != (actual := content_sha256(manifest.files)):
        raise IncompleteTableError(f"manifest of {directory} states cell_sha256 {stated}, its files give {actual}")
    return manifest


def verify_cell_table(directory: Path) -> Manifest:
    """Checks the table completely: manifest, every checksum, no unlisted file, every lesson of the cell.

    Raises:
        IncompleteTableError: names the first thing that is missing or differs.
    """
    manifest = read_cell_table(directory)
    verify_files(directory, manifest)
    if extra := unlisted_files(directory, manifest):
        raise IncompleteTableError(f"{directory} holds {extra[0]!r}, which its manifest does not list; remove it")
    result = read_cell(directory)
    if not result.is_complete or result.cell.identity() != manifest.config:
        raise IncompleteTableError(f"{directory} does not hold every lesson of the cell that its manifest states")
    return manifest


def _copy_table(source: Path, target: Path) -> None:
    """Copies a committed table with its manifest, whose checksums its files must have."""
    manifest = read_manifest(source)
    for name in (*(entry.path for entry in manifest.files), MANIFEST_NAME):
        copied = contained_path(target, name)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(contained_path(source, name), copied)
    verify_files(target, manifest)


CELLS = TableKind(
    name=CELL_TABLE,
    noun="continual model",
    publisher="userrep continual --publish",
    model_type="continual-model",
    identity="cell_sha256",
    params=("method", "label", "seed", "order", "config_hash"),
    tags=("label", "seed", "order"),
    read=read_cell_table,
    verify=verify_cell_table,
    describe=lambda facts: f"{facts['label']}, seed {facts['seed']}, taught {' > '.join(facts['order'])}",
)
