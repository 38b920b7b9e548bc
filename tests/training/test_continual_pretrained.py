"""Cells that go on from a pretrained encoder: its vector is measured and not taught, and methods keep it or do not."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests.support.pretrained import pretrained_cell, pretrained_tasks, write_encoder
from tests.support.tiny_cell import ORDER, Points, assert_same_state, method_state, timeless, tiny_cell, tiny_tasks
from userrep.config import ConfigError
from userrep.continual.baselines import FineAll
from userrep.continual.catalog import METHODS
from userrep.continual.method import Method
from userrep.continual.network import Network, TaskSpec
from userrep.data.tasks import TaskSet
from userrep.models.backbone import Backbone
from userrep.training import continual as module
from userrep.training.backbones import open_backbone
from userrep.training.cells import Cell, CellResult, read_cell
from userrep.training.continual import run_cell
from userrep.training.task_scores import score_task

FROM_PRETRAINED = tuple(name for name, entry in METHODS.items() if entry.method.takes_pretrained)
# HAT because the vector uses all channels of all mask points, and all parameters besides are frozen.
KEEPING = ("sinmo", "piggyback", "peterrec", "hat")


class Taught(NamedTuple):
    cell: Cell
    directory: Path
    result: CellResult
    points: Points

    def method(self) -> Method:
        """As it is after the last task."""
        tasks = pretrained_tasks()
        backbones = open_backbone(self.cell.training.backbone, tasks.sequences, "cpu")
        course = module._Course(self.cell, tasks, lambda point: None, "cpu", backbones)
        course.restore(self.directory, read_cell(self.directory).lessons)
        return course.method.eval()

    @torch.no_grad()
    def vectors(self) -> torch.Tensor:
        """Of T1, of all users."""
        return self.method().vectors(all_items(), 0)


def all_items() -> torch.Tensor:
    return torch.from_numpy(pretrained_tasks().sequences.items).long()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job") / "encoder"
    write_encoder(path)
    return path


@pytest.fixture(scope="module")
def teach(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Taught]:
    """Teaches a method three tasks, once for all tests."""

    @cache
    def run(name: str) -> Taught:
        directory, points = tmp_path_factory.mktemp(name), Points()
        cell = pretrained_cell(encoder, name, seed=3)
        return Taught(cell, directory, run_cell(cell, pretrained_tasks(), directory, points), points)

    return run


def pretrained(encoder: Path) -> Backbone:
    """The encoder itself."""
    backbones = open_backbone(pretrained_cell(encoder, "hat").training.backbone, pretrained_tasks().sequences, "cpu")
    assert backbones.pretrained is not None
    backbone = backbones.new()
    backbone.load_state_dict(dict(backbones.pretrained))
    return backbone


def recall_of(backbone: Backbone) -> float:
    """Of the encoder alone, on test users."""
    method, tasks = FineAll(Network(backbone)), pretrained_tasks()
    method.begin_task(TaskSpec("T1", "vector", 1))
    return score_task(method, 0, tasks.tasks[0], tasks.sequences, "test", 5).score


@pytest.mark.parametrize("name", FROM_PRETRAINED)
def test_the_vector_is_measured_and_not_taught(name: str, encoder: Path, teach: Callable[[str], Taught]) -> None:
    taught = teach(name)
    first, second, third = taught.result.lessons
    expected = recall_of(pretrained(encoder))
    assert 0 < expected < 1
    assert taught.result.scores_MM[0, 0] == expected
    assert (first.tasks, first.curve, first.num_steps) == (("T1",), (), 0)
    assert third.metrics == {"T1": "recall_at_10", "T2": "mrr_at_5", "T3": "accuracy"}
    assert [point.tasks for point in taught.points.of("test/")] == [("T1",), ("T2",), ("T3",)]
    assert {point.tasks for point in taught.points.of("train/")} == {("T2",), ("T3",)}
    assert 0 < second.num_steps < third.num_steps
    # What it starts from is what was pretrained, and no item vector is kept with it.
    state = {key: value for key, value in method_state(taught.directory, 0).items() if ".user_encoder." in key}
    assert_same_state(state, {f"network.backbone.{k}": v for k, v in pretrained(encoder).state_dict().items()})
    for number in range(3):
        assert not any("item_VD" in key for key in method_state(taught.directory, number))


@pytest.mark.parametrize("name", FROM_PRETRAINED)
def test_stopped_after_every_task_it_goes_on_bit_for_bit(
    name: str, teach: Callable[[str], Taught], tmp_path: Path
) -> None:
    taught = teach(name)
    for number, task in enumerate(ORDER[1:], 1):
        with pytest.raises(InterruptedError):
            run_cell(taught.cell, pretrained_tasks(), tmp_path, Points(stop_at=task))
        assert len(list(tmp_path.glob("task-*"))) == number
    result = run_cell(taught.cell, pretrained_tasks(), tmp_path, Points())
    assert timeless(result) == timeless(taught.result)
    for number in range(3):
        assert_same_state(method_state(tmp_path, number), method_state(taught.directory, number))


@pytest.mark.parametrize("name", FROM_PRETRAINED)
@torch.no_grad()
def test_which_methods_keep_the_vectors_bit_for_bit(name: str, encoder: Path, teach: Callable[[str], Taught]) -> None:
    taught = teach(name)
    is_kept = torch.equal(taught.vectors(), pretrained(encoder)(all_items()))
    assert is_kept == (name in KEEPING)
    if is_kept:
        assert len(set(taught.result.scores_MM[:, 0].tolist())) == 1
    # Later tasks learn nonetheless.
    curve = taught.result.lessons[1].curve
    assert min(point.losses["T2"] for point in curve[1:]) < curve[0].losses["T2"]


def test_hat_leaves_the_user_encoder_as_it_is(encoder: Path, teach: Callable[[str], Taught]) -> None:
    method: Any = teach("hat").method()
    assert method.used.eq(1).all()
    assert_same_state(method.network.backbone.state_dict(), pretrained(encoder).state_dict())


def test_no_mask_of_teracon_is_on_the_vector(teach: Callable[[str], Taught]) -> None:
    method: Any = teach("teracon").method()
    assert method.relations is not None
    for scale in (0.02, 1.0, 50.0):
        assert method.masks(0, scale).eq(1).all()
        assert not method.masks(1, scale).eq(1).all()
    assert method.final_masks(0).shape == (3, 8)
    [row, *_] = np.array(teach("teracon").result.lessons[-1].similarity)
    assert row[0] == pytest.approx(1, abs=1e-6)
    assert (row[1:] < 1).all()


def test_retention_of_teracon_keeps_vectors_near(encoder: Path, tmp_path: Path) -> None:
    """Nearer than without it, and than without a method, from the same start with the same samples."""
    expected, distances = pretrained(encoder)(all_items()).detach(), {}
    for name, options in {"fineall": {}, "teracon": {}, "open": {"retention_weight": 0}}.items():
        cell = pretrained_cell(encoder, "teracon" if name == "open" else name, max_epochs=4, **options)
        points = Points()
        result = run_cell(cell, pretrained_tasks(), tmp_path / name, points)
        taught = Taught(cell, tmp_path / name, result, points)
        distances[name] = (taught.vectors() - expected).norm(dim=1).mean().item()
    assert 0 < distances["teracon"] < 0.5 * min(distances["fineall"], distances["open"]), distances


def test_the_first_lesson_can_be_borrowed(encoder: Path, teach: Callable[[str], Taught], tmp_path: Path) -> None:
    """It has no epochs and no steps."""
    taught, points = teach("teracon"), Points()
    cell = taught.cell.until(2)
    result = run_cell(cell, pretrained_tasks(), tmp_path, points, lenders=[taught.directory])
    assert not points.of("train/")
    assert timeless(result) == timeless(taught.result)[:2]
    expected = [point for point in taught.points if point.tasks != ("T3",) and "train/loss" not in point.metrics]
    assert [(p.step, p.tasks, p.phase, p.epoch, sorted(p.metrics)) for p in points] == [
        (p.step, p.tasks, p.phase, p.epoch, sorted(p.metrics)) for p in expected
    ]


@pytest.mark.parametrize("name", ["conure", "mtl"])
def test_methods_that_train_the_first_task_are_refused(name: str, encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot go on from a pretrained backbone: leave it out"):
        run_cell(pretrained_cell(encoder, name), pretrained_tasks(), tmp_path, Points())
    assert not list(tmp_path.iterdir())


def test_the_first_task_must_suit_the_backbone(encoder: Path, tmp_path: Path) -> None:
    def run(cell: Cell, tasks: TaskSet) -> None:
        run_cell(cell, tasks, tmp_path, Points())

    with pytest.raises(ConfigError, match="the order begins with T1, of kind vector: a pretrained backbone begins"):
        run(tiny_cell("fineall"), pretrained_tasks())
    untaught = replace(pretrained_tasks(), tasks=tiny_tasks().tasks)
    with pytest.raises(ConfigError, match="the order begins with T1, of kind next_item"):
        run(pretrained_cell(encoder, "fineall"), untaught)
    with pytest.raises(ConfigError, match="the order begins with T2, of kind item"):
        run(pretrained_cell(encoder, "fineall", ("T2", "T1")), pretrained_tasks())
    with pytest.raises(ConfigError, match="have no texts"):
        run(pretrained_cell(encoder, "fineall"), replace(untaught, sequences=tiny_tasks().sequences))
    assert not list(tmp_path.iterdir())
