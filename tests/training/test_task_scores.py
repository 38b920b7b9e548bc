"""Scores over all samples of a split, against loops; and the likeness of masks."""

import math
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.support.continual import spec, tiny_method
from tests.support.tiny_cell import tiny_tasks
from userrep.continual.catalog import build_method
from userrep.continual.method import Method
from userrep.continual.network import TaskSpec
from userrep.data.tasks import ItemSequences, Task, vector_task
from userrep.models.nextitnet import NextItNet, NextItNetConfig
from userrep.training import task_scores
from userrep.training.state import NonFiniteLossError
from userrep.training.task_scores import halves, mask_similarity, score_task

MANY_ITEMS = 300


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


@given(st.lists(st.integers(2, 9), min_size=1, max_size=6), st.integers(9, 11))
def test_halves_are_those_of_lists(lengths: list[int], num_places: int) -> None:
    items = np.zeros((len(lengths), num_places), dtype=np.int32)
    for row, length in enumerate(lengths):
        items[row, num_places - length :] = np.arange(1, length + 1) + 10 * row
    earlier, later = halves(items)
    for row, length in enumerate(lengths):
        history = [number for number in items[row].tolist() if number]
        for half, expected in ((earlier, history[: length // 2]), (later, history[length // 2 :])):
            assert half[row].tolist() == [0] * (num_places - len(expected)) + expected


def vector_world(num_users: int, seed: int = 0) -> tuple[ItemSequences, Task]:
    """No item twice, so that no two halves are equal. All users but one of each other split are test users."""
    rng = np.random.default_rng(seed)
    items = rng.permutation(np.arange(1, MANY_ITEMS, dtype=np.int32))[: num_users * 6].reshape(num_users, 6)
    items[np.arange(6) < rng.integers(0, 5, (num_users, 1))] = 0
    ids = ("", *(f"i{n}" for n in range(1, MANY_ITEMS)))
    sequences = ItemSequences(items, pa.array([f"u{n}" for n in range(num_users)]), ids)
    return sequences, vector_task("T1", sequences, np.array([0, 1, *[2] * (num_users - 2)], dtype=np.int8))


def vector_method(seed: int = 0) -> Method:
    torch.manual_seed(seed)
    method = build_method("fineall", {}, lambda: NextItNet(NextItNetConfig(dim=8, dilations=(1, 2)), MANY_ITEMS))
    method.begin_task(TaskSpec("T1", "vector", 1))
    method.end_task()
    return method


@torch.no_grad()
def naive_recall(method: Method, histories: list[list[int]]) -> float:
    """One half at a time; ties of random floats do not occur."""

    def encode(history: list[int]) -> torch.Tensor:
        padded = [0] * (6 - len(history)) + history
        return F.normalize(method.vectors(torch.tensor([padded]), 0)[0], dim=0)

    cut = [(history[: len(history) // 2], history[len(history) // 2 :]) for history in histories]
    earlier, later = ([encode(pair[side]) for pair in cut] for side in (0, 1))
    hits = []
    for anchors, candidates in ((earlier, later), (later, earlier)):
        for user, anchor in enumerate(anchors):
            scores = [float(anchor @ candidate) for candidate in candidates]
            hits.append(sum(score > scores[user] for score in scores) < 10)
    return sum(hits) / len(hits)


@pytest.mark.parametrize(("batch_size", "pool"), [(1, 1000), (7, 1000), (1000, 25)])
def test_recall_of_vectors_is_that_of_loops_over_users(
    batch_size: int, pool: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_scores, "MAX_POOL", pool)
    method = vector_method().double().train()
    sequences, task = vector_world(42)
    rows = [[number for number in row if number] for row in sequences.items[2:].tolist()]
    score = score_task(method, 0, task, sequences, "test", batch_size)
    expected = naive_recall(method, rows[:pool])
    assert 0 < expected < 1
    assert score.score == pytest.approx(expected, abs=1e-12)
    assert math.isnan(score.loss)
    assert method.training


@pytest.mark.parametrize("num_users", [11, 27, 60])
def test_recall_of_an_encoder_that_knows_users_and_of_one_that_knows_nothing(
    num_users: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = vector_method()
    rows = np.arange(num_users) + 1
    sequences = ItemSequences(
        np.repeat(rows[:, None], 3, axis=1).astype(np.int32),
        pa.array([f"u{n}" for n in rows]),
        ("", *(f"i{n}" for n in rows)),
    )
    task = vector_task("T1", sequences, np.array([0, 1, *[2] * (num_users - 2)], dtype=np.int8))
    eye = torch.eye(num_users + 1)
    # Every half holds but the one item of its user.
    monkeypatch.setattr(method, "vectors", lambda items_BL, number: eye[items_BL.amax(dim=1)])
    assert score_task(method, 0, task, sequences, "test", 8).score == 1
    monkeypatch.setattr(method, "vectors", lambda items_BL, number: torch.ones(len(items_BL), 4))
    assert score_task(method, 0, task, sequences, "test", 8).score == pytest.approx(min(1, 10 / (num_users - 2)))


def test_vectors_that_are_not_finite_are_those_of_a_cell_that_has_diverged() -> None:
    method = vector_method()
    sequences, task = vector_world(20)
    with torch.no_grad():
        next(method.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="logits of task T1 are not finite for test users") as caught:
        score_task(method, 0, task, sequences, "test", 4)
    assert caught.value.evidence == {"task": "T1", "split": "test"}
