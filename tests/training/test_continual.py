"""Cells: they learn, go on bit for bit, do on several ranks what they do on one, and choose the best epoch."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.tiny_cell import (
    NUM_ITEMS,
    ORDER,
    Points,
    assert_same_state,
    method_state,
    run_tiny,
    timeless,
    tiny_cell,
    tiny_tasks,
)
from userrep.continual.catalog import METHODS
from userrep.data.tasks import TaskSet
from userrep.training import continual as module
from userrep.training.backbones import open_backbone
from userrep.training.cells import CellResult
from userrep.training.continual import run_cell
from userrep.training.continual_step import take_step
from userrep.training.state import NonFiniteLossError
from userrep.training.task_scores import Scored


def test_teracon_learns_all_tasks_and_keeps_them(tmp_path: Path) -> None:
    result, _ = run_tiny(tiny_cell(max_epochs=30), tmp_path)
    chance = {"T1": sum(1 / rank for rank in range(1, 6)) / NUM_ITEMS, "T2": 0.5, "T3": 0.5}
    final = result.lessons[-1].scores
    assert final["T1"] > 2 * chance["T1"]
    assert final["T2"] > 0.6
    assert final["T3"] > 0.8
    similarity = np.array(result.lessons[-1].similarity)
    assert similarity.shape == (3, 3)
    assert similarity == pytest.approx(similarity.T)


def test_every_task_is_measured_after_every_task(tmp_path: Path) -> None:
    order = ("T3", "T1", "T2")
    result, points = run_tiny(tiny_cell("fineall", order), tmp_path)
    assert np.array_equal(np.isfinite(result.scores_MM), np.tri(3, dtype=bool))
    assert [list(lesson.scores) for lesson in result.lessons] == [["T3"], ["T3", "T1"], ["T3", "T1", "T2"]]
    assert [point.tasks for point in points.of("test/")] == [("T3",), ("T1",), ("T2",)]
    assert points.of("test/")[-1].metrics == {
        "test/T3/accuracy": result.scores_MM[2, 0],
        "test/T1/mrr_at_5": result.scores_MM[2, 1],
        "test/T2/mrr_at_5": result.scores_MM[2, 2],
    }


def test_the_stream_of_points(tmp_path: Path) -> None:
    result, points = run_tiny(tiny_cell("conure", ORDER[:2], max_epochs=1), tmp_path)
    steps = points.of("train/loss")
    assert [point.step for point in steps] == list(range(1, len(steps) + 1))
    assert result.lessons[-1].num_steps == len(steps)
    # T1 has a sample per user, T2 two; 36 users to train on, in batches of 8 and less.
    places = [(point.tasks[0], point.phase, point.epoch) for point in steps]
    for task, num_steps in (("T1", 5), ("T2", 9)):
        for phase in ("train", "retrain"):
            assert places.count((task, phase, 1)) == num_steps
    for lesson in result.lessons:
        assert [(point.phase, point.epoch) for point in lesson.curve] == [
            *(("train", 0), ("train", 1)),
            *(("retrain", 0), ("retrain", 1)),
        ]
    assert len(points.of("val/")) == 8


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("teracon", {}),
        ("teracon", {"teacher_scale": "fixed"}),
        ("hat", {}),
        ("conure", {}),
        ("sinmo", {}),
        ("peterrec", {}),
    ],
)
def test_stopped_after_every_task_it_goes_on_bit_for_bit(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    cell = tiny_cell(name, seed=3, **options)
    whole, points = run_tiny(cell, tmp_path / "whole")
    stopped, told = tmp_path / "stopped", []
    for number, task in enumerate(ORDER[1:], 1):
        report = Points(stop_at=task)
        with pytest.raises(InterruptedError):
            run_cell(cell, tiny_tasks(), stopped, report)
        assert len(list(stopped.glob("task-*"))) == number
        told += [point for point in report if point.tasks != (task,)]
    result, rest = run_tiny(cell, stopped)
    assert timeless(result) == timeless(whole)
    for number in range(3):
        assert_same_state(method_state(stopped, number), method_state(tmp_path / "whole", number))
    assert [(p.step, p.metrics.get("train/loss")) for p in [*told, *rest]] == [
        (p.step, p.metrics.get("train/loss")) for p in points
    ]


def test_a_backbone_in_bfloat16_learns_nearly_the_same(tmp_path: Path) -> None:
    cell = tiny_cell("teracon", ORDER[:2])
    expected, _ = run_tiny(cell, tmp_path / "float32")
    training = cell.training.model_copy(update={"precision": "bfloat16"})
    result, _ = run_tiny(cell.model_copy(update={"training": training}), tmp_path / "bfloat16")
    for lesson, other in zip(result.lessons, expected.lessons, strict=True):
        for point, reference in zip(lesson.curve, other.curve, strict=True):
            assert point.losses == pytest.approx(reference.losses, rel=0.05)
    assert result.lessons[0].curve[0].losses != expected.lessons[0].curve[0].losses
    assert {value.dtype for value in method_state(tmp_path / "bfloat16", 1).values()} == {torch.float32}


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_cell_is_not_run_again(name: str, tmp_path: Path) -> None:
    cell = tiny_cell(name, max_epochs=1)
    first, _ = run_tiny(cell, tmp_path)
    again, points = run_tiny(cell, tmp_path)
    assert first.is_complete
    assert again == first
    assert not points


def test_a_joint_method_learns_all_tasks_in_one_lesson(tmp_path: Path) -> None:
    with mock.patch.object(module, "take_step", side_effect=take_step) as step:
        result, _ = run_tiny(tiny_cell("mtl"), tmp_path)
    [lesson] = result.lessons
    assert lesson.tasks == ORDER
    assert np.array_equal(np.isfinite(result.scores_MM), [[False] * 3, [False] * 3, [True] * 3])
    taught = [(call.args[2].name, call.args[5].task) for call in step.call_args_list]
    assert set(taught) == {("T1", 0), ("T2", 1), ("T3", 2)}
    epoch = [name for name, _ in taught][: len(taught) // 2]
    assert (epoch.count("T1"), epoch.count("T2"), epoch.count("T3")) == (5, 9, 5)
    assert epoch != sorted(epoch)


def test_epochs_are_permutations_of_the_training_samples(tmp_path: Path) -> None:
    with mock.patch.object(module, "take_step", side_effect=take_step) as step:
        run_tiny(tiny_cell("conure", ORDER[:2]), tmp_path)
    orders = []
    calls = iter(step.call_args_list)
    for task, num_steps in zip(tiny_tasks().tasks[:2], (5, 9), strict=True):
        for _epoch in range(4):  # two of each phase
            epoch = [next(calls) for _ in range(num_steps)]
            batches = [call.args[4] for call in epoch]
            assert [(call.args[5].step, call.args[5].num_steps) for call in epoch] == [
                (number, num_steps) for number in range(num_steps)
            ]
            assert [len(batch) for batch in batches[:-1]] == [8] * (num_steps - 1)
            order = np.concatenate(batches)
            assert np.array_equal(np.sort(order), task.samples("train"))
            orders.append(order.tobytes())
    assert next(calls, None) is None
    assert len(set(orders)) == 8


def scripted_run(
    directory: Path, losses: list[float], patience: int, patience_steps: int = 0
) -> tuple[CellResult, list[dict[str, Any]]]:
    """A cell of one task with given validation losses, and the states that were measured."""
    cell = tiny_cell("fineall", ORDER[:1], max_epochs=len(losses) - 1)
    limits = {"patience": patience, "patience_steps": patience_steps}
    cell = cell.model_copy(update={"training": cell.training.model_copy(update=limits)})
    states, script = [], iter(losses)

    def score(method: Any, number: int, task: Any, sequences: Any, split: str, batch_size: int) -> Scored:
        states.append({name: value.clone() for name, value in method.state_dict().items()})
        return Scored(0.5, next(script) if split == "validation" else 0.5)

    with mock.patch.object(module, "score_task", side_effect=score):
        result, _ = run_tiny(cell, directory)
    return result, states


@pytest.mark.parametrize(
    ("losses", "patience", "num_epochs", "best"),
    [
        ([0.9, 0.8, 0.5, 0.7, 0.5, 0.1], 2, 4, 2),  # a tie is no gain
        ([0.9, 0.8, 0.5, 0.7, 0.4, 0.6, 0.5, 0.3], 2, 6, 4),
        ([0.1, 0.8, 0.9, 0.9], 5, 3, 1),  # what is not trained is never the best
        ([0.9, 0.8, 0.7], 5, 2, 2),  # as many epochs as there may be
        ([0.5, 0.5, 0.5, 0.5], 1, 2, 1),
    ],
)
def test_early_stopping_restores_the_best_epoch(
    losses: list[float], patience: int, num_epochs: int, best: int, tmp_path: Path
) -> None:
    result, states = scripted_run(tmp_path, losses, patience)
    [lesson] = result.lessons
    assert [point.losses["T1"] for point in lesson.curve] == losses[: num_epochs + 1]
    assert len(states) == num_epochs + 2  # and once on test users
    assert_same_state(states[-1], states[best])
    assert_same_state(method_state(tmp_path, 0), states[best])


def test_small_tasks_are_given_steps_to_learn(tmp_path: Path) -> None:
    losses = [0.9, 0.5, *([0.6] * 9)]
    steps_of_an_epoch = scripted_run(tmp_path / "one", losses[:2], 1)[0].lessons[0].num_steps
    result, _ = scripted_run(tmp_path / "all", losses, 2, patience_steps=4 * steps_of_an_epoch)
    assert len(result.lessons[0].curve) == 1 + 1 + 4


def test_epochs_of_a_joint_method_are_compared_by_losses_over_those_of_a_guess() -> None:
    cell, tasks = tiny_cell("mtl", ORDER), tiny_tasks()
    backbones = open_backbone(cell.training.backbone, tasks.sequences, "cpu")
    course = module._Course(cell, tasks, lambda point: None, "cpu", backbones)
    guess = {task.name: math.log(task.num_classes) for task in course.tasks}
    assert course._relative_loss(guess) == pytest.approx(1)
    for name in guess:
        better = guess | {name: guess[name] / 2}
        assert course._relative_loss(better) == pytest.approx(1 - 1 / 2 / len(guess))


def _run_on_a_rank(_rank: int, root: str) -> list[list[dict[str, float]]]:
    """Metrics of cells of several methods, in float64."""
    torch.set_default_dtype(torch.float64)
    told = []
    for name, options in PARALLEL.items():
        cell, points = tiny_cell(name.partition(", ")[0], **options), Points()
        # 36 samples in batches of 7: the last one has a single sample, so one of two ranks has none.
        training = cell.training.later.model_copy(update={"batch_size": 7})
        backbone = cell.training.backbone.model_copy(update={"sparse_items": name.endswith("sparse items")})
        config = cell.training.model_copy(update={"first": training, "later": training, "backbone": backbone})
        tasks = tiny_tasks()
        run_cell(cell.model_copy(update={"training": config}), with_one_test_user(tasks), Path(root, name), points)
        told.append([{k: v for k, v in point.metrics.items() if k != "time/epoch_s"} for point in points])
    torch.set_default_dtype(torch.float32)
    return told


PARALLEL: dict[str, dict[str, Any]] = {
    "teracon": {"sampling": "all"},
    "teracon, fixed teacher": {"sampling": "all", "teacher_scale": "fixed"},
    "hat": {},
    "mtl": {},
    "sinmo, sparse items": {},
}


def with_one_test_user(tasks: TaskSet) -> TaskSet:
    """T3 is measured on one user, so of two ranks one has nothing to measure."""
    last = tasks.tasks[2]
    split = last.split.copy()
    split[np.flatnonzero(split == 2)[1:]] = 1
    return replace(tasks, tasks=(*tasks.tasks[:2], replace(last, split=split)))


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    alone = _run_on_a_rank(0, str(tmp_path / "alone"))
    ranks = run_ranks(_run_on_a_rank, 2, str(tmp_path / "ranks"))
    assert ranks[0] == ranks[1]
    for name, told, expected in zip(PARALLEL, ranks[0], alone, strict=True):
        assert len(told) == len(expected)
        for own, other in zip(told, expected, strict=True):
            assert own == pytest.approx(other, abs=1e-6)
        lessons = sorted(path.name for path in (tmp_path / "alone" / name).iterdir())
        for number in (int(lesson.removeprefix("task-")) for lesson in lessons):
            state, expected_state = (method_state(tmp_path / where / name, number) for where in ("ranks", "alone"))
            for key, value in expected_state.items():
                torch.testing.assert_close(state[key], value, rtol=0, atol=1e-6, msg=key)


def test_a_loss_that_is_not_finite_says_where(tmp_path: Path) -> None:
    cell = tiny_cell("fineall")
    wild = cell.training.later.model_copy(update={"learning_rate": 1e30})
    cell = cell.model_copy(update={"training": cell.training.model_copy(update={"later": wild})})
    with pytest.raises(
        NonFiniteLossError, match=r"fineall, seed 0: the loss of task T2 .* phase train, epoch 1, step 1"
    ):
        run_tiny(cell, tmp_path)
    assert len(list(tmp_path.glob("task-*"))) == 1


def test_the_evidence_is_plain_json() -> None:
    error = module._non_finite(tiny_cell(), "T2", "train", 2, 3, 40, {"train/loss": float("nan")})
    assert json.loads(json.dumps(error.evidence, allow_nan=False))["metrics"] == {"train/loss": "nan"}


def _diverge_on_a_rank(_rank: int, root: str) -> str:
    """The only step of an epoch makes parameters that give no finite logit."""
    wild = tiny_cell().training.first.model_copy(update={"learning_rate": 1e30, "batch_size": 1000})
    cell = tiny_cell("fineall", ORDER[2:])
    training = cell.training.model_copy(update={"first": wild})
    try:
        run_tiny(cell.model_copy(update={"training": training}), Path(root))
    except NonFiniteLossError as error:
        return str(error)
    return ""


def test_a_cell_that_diverges_in_the_last_step_of_an_epoch_says_so_on_every_rank(tmp_path: Path) -> None:
    expected = "logits of task T3 are not finite for validation users: lower its learning rate"
    assert run_ranks(_diverge_on_a_rank, 2, str(tmp_path)) == [expected] * 2
