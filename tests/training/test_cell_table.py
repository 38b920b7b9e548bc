"""A finished cell as a table: all lessons and the encoder, intact, or nothing."""

import json
import shutil
from pathlib import Path

import pytest

from tests.support.pretrained import pretrained_cell, pretrained_tasks, write_encoder
from tests.support.tiny_cell import ORDER, Points, run_tiny, tiny_cell, tiny_tasks
from userrep.manifest import IncompleteTableError, read_manifest, write_manifest
from userrep.training.cell_table import CELLS, ENCODER, write_cell_table
from userrep.training.cells import METHOD_FILE, Cell, read_cell
from userrep.training.continual import run_cell

CELL = tiny_cell("fineall", ORDER[:2], max_epochs=1)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cells") / "taught"
    run_tiny(CELL, path)
    return path


@pytest.fixture
def table(taught: Path, tmp_path: Path) -> Path:
    write_cell_table(taught, CELL, tmp_path / "table")
    return tmp_path / "table"


def test_the_table_holds_what_the_cell_has_left(table: Path, taught: Path) -> None:
    manifest = CELLS.verify(table)
    assert manifest == CELLS.read(table)
    assert read_cell(table) == read_cell(taught)
    assert {entry.path for entry in manifest.files} == {
        path.relative_to(taught).as_posix() for path in taught.rglob("*") if path.is_file()
    }
    for entry in manifest.files:
        assert (table / entry.path).read_bytes() == (taught / entry.path).read_bytes()
    assert not {Path(entry.path).suffix for entry in manifest.files} - {".safetensors", ".json"}
    assert manifest.inputs == read_manifest(taught / "task-01").inputs
    assert CELLS.tags_of(manifest.facts) == {"label": "fineall", "seed": "0", "order": "T1,T2"}
    assert CELLS.describe(manifest.facts) == "fineall, seed 0, taught T1 > T2"


def test_the_same_cell_gives_the_same_table(table: Path, taught: Path, tmp_path: Path) -> None:
    """So publishing that was interrupted goes on, and a second time makes no second version."""
    assert write_cell_table(taught, CELL, tmp_path / "again") == CELLS.verify(table)


def test_a_joint_method_has_one_lesson(tmp_path: Path) -> None:
    cell = tiny_cell("mtl", ORDER[:2], max_epochs=1)
    run_tiny(cell, tmp_path / "cell")
    write_cell_table(tmp_path / "cell", cell, tmp_path / "table")
    assert {Path(entry.path).parent.name for entry in CELLS.verify(tmp_path / "table").files} == {"task-01"}


def test_the_encoder_comes_along_and_the_path_of_it_does_not(tmp_path: Path) -> None:
    write_encoder(tmp_path / "job" / "encoder")
    cell = pretrained_cell(tmp_path / "job" / "encoder", "sinmo", ("T1", "T3"), max_epochs=1)
    backbone = cell.training.backbone
    assert backbone.encoder is not None
    pinned = backbone.model_copy(update={"encoder": backbone.encoder.pinned()})
    cell = cell.model_copy(update={"training": cell.training.model_copy(update={"backbone": pinned})})
    run_cell(cell, pretrained_tasks(), tmp_path / "cell", Points())
    write_cell_table(tmp_path / "cell", cell, tmp_path / "table")
    assert read_manifest(tmp_path / "table" / ENCODER) == read_manifest(tmp_path / "job" / "encoder")
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "table").rglob("*.json"))
    (tmp_path / "job" / "encoder" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(IncompleteTableError, match="has 7 bytes"):
        write_cell_table(tmp_path / "cell", cell, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("other", [CELL.until(1), tiny_cell("fineall", max_epochs=1), tiny_cell("hat", ORDER[:2])])
def test_what_is_not_the_finished_cell_is_no_table(other: Cell, taught: Path, tmp_path: Path) -> None:
    with pytest.raises(IncompleteTableError, match="finish the cell first"):
        write_cell_table(taught, other, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_an_unfinished_cell_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        run_cell(CELL, tiny_tasks(), tmp_path / "cell", Points(stop_at="T2"))
    with pytest.raises(IncompleteTableError, match="holds 1 tasks of a cell"):
        write_cell_table(tmp_path / "cell", CELL, tmp_path / "table")


def damage(table: Path) -> None:
    (table / "task-01" / METHOD_FILE).write_bytes(b"")


def lose(table: Path) -> None:
    (table / "task-00" / "manifest.json").unlink()


def add(table: Path) -> None:
    (table / "task-01" / "model.pkl").write_bytes(b"")


def state_another_kind(table: Path) -> None:
    write_manifest(table, read_manifest(table).model_copy(update={"table": "user_embeddings"}))


def forget_a_fact(table: Path) -> None:
    manifest = read_manifest(table)
    facts = {key: value for key, value in manifest.facts.items() if key != "order"}
    write_manifest(table, manifest.model_copy(update={"facts": facts}))


def leave_a_file_out(table: Path) -> None:
    manifest = read_manifest(table)
    write_manifest(table, manifest.model_copy(update={"files": manifest.files[1:]}))


def state_another_cell(table: Path) -> None:
    manifest = read_manifest(table)
    write_manifest(table, manifest.model_copy(update={"config": {**manifest.config, "seed": 7}}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage, "has 0 bytes"),
        (lose, "is missing although"),
        (add, "which its manifest does not list"),
        (state_another_kind, "of kind 'user_embeddings', wanted 'continual_model'"),
        (forget_a_fact, "lacks the facts order"),
        (leave_a_file_out, "states cell_sha256"),
        (state_another_cell, "does not hold every lesson"),
        (lambda table: shutil.rmtree(table), "holds no manifest"),
    ],
)
def test_what_differs_from_its_manifest_is_refused(change, message: str, table: Path) -> None:
    change(table)
    with pytest.raises(IncompleteTableError, match=message):
        CELLS.verify(table)


def test_a_file_outside_of_the_table_is_refused(table: Path) -> None:
    text = (table / "manifest.json").read_text()
    (table / "manifest.json").write_text(json.dumps(json.loads(text.replace("task-00/lesson", "../task-00/lesson"))))
    with pytest.raises(IncompleteTableError, match="outside the directory"):
        CELLS.verify(table)
