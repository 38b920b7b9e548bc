"""Scores over all samples of a split, against loops; and the likeness of masks."""

import math
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.support.continual import spec, tiny_method
from tests.support.tiny_cell import tiny_tasks
from userrep.continual.method import Method
from userrep.continual.network import TaskSpec
from userrep.training.task_scores import mask_similarity, score_task


def taught(name: str = "fineall") -> Method:
    method = tiny_method(name)
    for task in tiny_tasks().tasks:
        method.begin_task(TaskSpec(task.name, task.kind, task.num_classes))
        method.end_task()
    return method


@torch.no_grad()
def naive_score(method: Method, number: int, split: int) -> tuple[float, float]:
    """One sample at a time; ties of random floats do not occur."""
    tasks = tiny_tasks()
    task, gains, losses = tasks.tasks[number], [], []
    for row, label, part in zip(task.rows, task.labels, task.split, strict=True):
        if part == split:
            logits = method.logits(torch.from_numpy(tasks.sequences.items[[row]]).long(), number)[0].tolist()
            place = sorted(logits, reverse=True).index(logits[label]) + 1
            gains.append(float(place == 1) if task.kind == "label" else 1 / place if place <= 5 else 0.0)
            losses.append(-math.log(math.exp(logits[label]) / sum(map(math.exp, logits))))
    return sum(gains) / len(gains), sum(losses) / len(losses)


@pytest.mark.parametrize("batch_size", [1, 5, 1000])
def test_scores_are_those_of_loops_over_samples(batch_size: int) -> None:
    method, tasks = taught().double(), tiny_tasks()
    for number, task in enumerate(tasks.tasks):
        for code, split in ((1, "validation"), (2, "test")):
            score = score_task(method, number, task, tasks.sequences, split, batch_size)
            assert tuple(score) == pytest.approx(naive_score(method, number, code), abs=1e-12)


def test_the_order_of_samples_is_of_no_influence_and_training_goes_on_in_its_mode() -> None:
    method, tasks = taught().train(), tiny_tasks()
    task = tasks.tasks[1]
    order = np.random.default_rng(0).permutation(len(task.rows))
    other = type(task)(task.name, task.kind, task.rows[order], task.labels[order], task.classes, task.split[order])
    assert score_task(method, 1, task, tasks.sequences, "test", 3) == score_task(
        method, 1, other, tasks.sequences, "test", 3
    )
    assert method.training


def test_similarity_of_masks_is_the_mean_cosine() -> None:
    method: Any = tiny_method("teracon")
    for number in range(3):
        method.begin_task(spec(number, "label"))
        method.end_task()
    similarity = cast(np.ndarray, mask_similarity(method))
    masks = [method.masks(number, method.config.max_scale).detach().numpy() for number in range(3)]
    for i in range(3):
        for j in range(3):
            cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(masks[i], masks[j], strict=True)]
            assert similarity[i, j] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert np.diag(similarity) == pytest.approx(1, abs=1e-6)


def test_methods_without_soft_masks_have_no_similarity() -> None:
    assert mask_similarity(taught("conure")) is None
    assert mask_similarity(taught("hat")) is not None
