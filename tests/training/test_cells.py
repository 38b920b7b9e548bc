"""What a cell's directory holds, and what is refused as such."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from tests.support.tiny_cell import ORDER, Points, method_state, run_tiny, tiny_cell, tiny_tasks
from userrep.config import ConfigError
from userrep.data.task_digests import digest_prefixes, digest_tasks
from userrep.data.tasks import ItemSequences, Task, TaskSet
from userrep.evaluation.transfer import backward_transfer
from userrep.manifest import IncompleteTableError, read_manifest, verify_files
from userrep.training.backbones import EncoderTable, NextItNetBackbone, PretrainedClue
from userrep.training.cells import LESSON_FILE, METHOD_FILE, Cell, ContinualConfig, choose_tasks, read_cell
from userrep.training.continual import run_cell


def test_a_result_can_be_read_without_running_anything(tmp_path: Path) -> None:
    cell = tiny_cell("hat", ORDER[::-1], seed=5, max_epochs=1, sparsity_weight=0.5)
    result, _ = run_tiny(cell, tmp_path)
    read = read_cell(tmp_path)
    assert read == result
    assert read.cell == cell
    assert np.array_equal(read.scores_MM, result.scores_MM, equal_nan=True)
    assert np.isfinite(backward_transfer(read.scores_MM)[:-1]).all()
    for number in range(3):
        directory = tmp_path / f"task-{number:02d}"
        verify_files(directory, read_manifest(directory))


def test_a_cell_that_was_stopped_can_be_read(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        run_cell(tiny_cell(max_epochs=1), tiny_tasks(), tmp_path, Points(stop_at="T3"))
    read = read_cell(tmp_path)
    assert not read.is_complete
    assert np.array_equal(np.isfinite(read.scores_MM), [[1, 0, 0], [1, 1, 0], [0, 0, 0]])


def test_a_directory_without_a_lesson_is_no_cell(tmp_path: Path) -> None:
    with pytest.raises(IncompleteTableError, match="holds no lesson"):
        read_cell(tmp_path / "nothing")


@pytest.mark.parametrize("damaged", [METHOD_FILE, LESSON_FILE, "manifest.json"])
def test_a_damaged_lesson_is_taught_again(damaged: str, tmp_path: Path) -> None:
    cell = tiny_cell("sinmo", max_epochs=1)
    whole, _ = run_tiny(cell, tmp_path)
    before = [method_state(tmp_path, number) for number in range(3)]
    path = tmp_path / "task-01" / damaged
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.warns(UserWarning, match="lesson passed over"):
        again, points = run_tiny(cell, tmp_path)
    assert {point.tasks for point in points} == {("T2",), ("T3",)}
    assert np.array_equal(again.scores_MM, whole.scores_MM, equal_nan=True)
    for number, state in enumerate(before):
        assert all((method_state(tmp_path, number)[name] == value).all() for name, value in state.items())


def test_a_missing_lesson_is_taught_again_with_those_after_it(tmp_path: Path) -> None:
    cell = tiny_cell("fineall", max_epochs=1)
    whole, _ = run_tiny(cell, tmp_path)
    (tmp_path / "task-00").rename(tmp_path / "lost")
    again, points = run_tiny(cell, tmp_path)
    assert {point.tasks for point in points} == {("T1",), ("T2",), ("T3",)}
    assert np.array_equal(again.scores_MM, whole.scores_MM, equal_nan=True)


def changed(tasks: TaskSet, what: str) -> TaskSet:
    items, task = tasks.sequences.items.copy(), tasks.tasks[1]
    labels, split = task.labels.copy(), task.split.copy()
    if what == "items":
        items[0, -1] = items[0, -1] % 12 + 1
    elif what == "labels":
        labels[0] = (labels[0] + 1) % task.num_classes
    else:
        split[split == 1] = 0
        split[:2] = 1
    sequences = ItemSequences(items, tasks.sequences.user_ids, tasks.sequences.item_ids)
    new = Task(task.name, task.kind, task.rows, labels, task.classes, split)
    return TaskSet(sequences, (tasks.tasks[0], new, tasks.tasks[2]), {})


@pytest.mark.parametrize("what", ["items", "labels", "split"])
def test_other_data_are_refused(what: str, tmp_path: Path) -> None:
    cell = tiny_cell("fineall", ORDER[:2], max_epochs=1)
    run_tiny(cell, tmp_path)
    with pytest.raises(ConfigError, match="other data"):
        run_cell(cell, changed(tiny_tasks(), what), tmp_path, Points())


def test_data_of_a_task_that_is_still_to_come_may_change(tmp_path: Path) -> None:
    cell = tiny_cell("fineall", max_epochs=1)
    with pytest.raises(InterruptedError):
        run_cell(cell, tiny_tasks(), tmp_path, Points(stop_at="T2"))
    points = Points()
    assert run_cell(cell, changed(tiny_tasks(), "labels"), tmp_path, points).is_complete
    assert {point.tasks for point in points} == {("T2",), ("T3",)}


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"method": "sinmo"}, {"order": ORDER[:2]}, {"training": ContinualConfig()}]
)
def test_the_directory_of_another_cell_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    cell = tiny_cell("fineall", max_epochs=1)
    run_tiny(cell, tmp_path)
    with pytest.raises(ConfigError, match="give this cell a directory of its own"):
        run_tiny(cell.model_copy(update=other), tmp_path)


def test_the_digest_ignores_tasks_that_are_not_in_the_cell() -> None:
    tasks, cell = tiny_tasks(), tiny_cell(order=("T1", "T3"))
    other = changed(tasks, "labels")
    assert digest_tasks(tasks, choose_tasks(cell, tasks), False) == digest_tasks(
        other, choose_tasks(cell, other), False
    )
    every = tiny_cell()
    assert digest_prefixes(tasks, choose_tasks(every, tasks), False) == tuple(
        digest_tasks(tasks, choose_tasks(every.until(number), tasks), False) for number in (1, 2, 3)
    )
    assert digest_tasks(tasks, choose_tasks(every, tasks), False) != digest_tasks(
        other, choose_tasks(every, other), False
    )


def test_texts_of_items_count_where_they_are_read() -> None:
    tasks = tiny_tasks()
    texts = tuple(f"text {number}" for number in range(tasks.sequences.num_items))
    found = {
        with_texts: {
            digest_tasks(replace(tasks, sequences=replace(tasks.sequences, texts=known)), tasks.tasks, with_texts)
            for known in (None, texts, (*texts[:-1], "another one"))
        }
        for with_texts in (False, True)
    }
    assert [len(found[with_texts]) for with_texts in (False, True)] == [1, 3]
    plain = tiny_cell().training
    assert not plain.reads_texts
    encoder = EncoderTable(path=Path("encoder"))
    for backbone in (NextItNetBackbone(encoder=encoder), PretrainedClue(encoder=encoder)):
        assert plain.model_copy(update={"backbone": backbone}).reads_texts


def test_what_cannot_be_taught_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="order names T9: the tasks of this data set are T1, T2, T3"):
        run_tiny(tiny_cell(order=("T1", "T9")), tmp_path)
    with pytest.raises(ConfigError, match="unknown method 'ewc'"):
        run_tiny(tiny_cell("ewc"), tmp_path)
    with pytest.raises(ValidationError, match="name every task once"):
        tiny_cell(order=("T1", "T1"))
    with pytest.raises(ConfigError, match="order"):
        Cell.parse({"method": "hat", "order": []})


def test_identity_and_label_of_a_cell() -> None:
    cell = tiny_cell("teracon", sampling="all", retention_weight=0.5)
    assert cell.label == "teracon(retention_weight=0.5, sampling=all)"
    assert tiny_cell("hat").label == "hat"
    assert Cell.parse(json.loads(json.dumps(cell.model_dump(mode="json")))) == cell
    hashes = {tiny_cell(seed=0).content_hash(), tiny_cell(seed=1).content_hash(), cell.content_hash()}
    assert len(hashes) == 3


def test_a_cell_is_known_by_the_digest_of_its_encoder_and_not_by_its_path() -> None:
    def of(path: str, digest: str) -> Cell:
        backbone = PretrainedClue(encoder=EncoderTable(path=Path(path), digest=digest))
        return tiny_cell().model_copy(update={"training": ContinualConfig(backbone=backbone)})

    cell = of("here/encoder", "a" * 12)
    assert of("there/encoder", "a" * 12).content_hash() == cell.content_hash()
    assert of("here/encoder", "b" * 12).content_hash() != cell.content_hash()
    assert "encoder" in cell.identity()["training"]["backbone"]
    assert "here" not in json.dumps(cell.identity())
    assert Cell.parse(cell.identity()).identity() == cell.identity()
    # Without a digest nothing but the path tells encoders apart; without an encoder nothing is left out.
    assert of("here/encoder", "").content_hash() != of("there/encoder", "").content_hash()
    assert tiny_cell().identity() == tiny_cell().model_dump(mode="json")


def test_the_first_task_has_settings_of_its_own() -> None:
    config = ContinualConfig()
    assert [config.of_task(number) for number in range(3)] == [config.first, config.later, config.later]
