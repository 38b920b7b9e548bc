"""Popularity on a task: known answers, and against ranking every sample by the counts of a plain loop."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.data.tasks import ItemSequences, Task, TaskKind
from userrep.evaluation.ranking import class_ranks, mrr_at_k
from userrep.evaluation.task_baselines import popularity_score

TRAIN, VALIDATION, TEST = 0, 1, 2


def sequences_of(rows: list[list[int]], num_items: int) -> ItemSequences:
    user_ids = pa.array([f"u{number}" for number in range(len(rows))])
    return ItemSequences(np.array(rows, np.int32), user_ids, ("", *(f"i{number}" for number in range(1, num_items))))


def task_of(kind: TaskKind, samples: list[tuple[int, int, int]], num_classes: int) -> Task:
    """A task with samples of row, label, split."""
    rows, labels, split = np.array(samples).T
    return Task("T", kind, rows, labels, tuple(map(str, range(num_classes))), split.astype(np.int8))


def of_labels(kind: TaskKind, train: list[int], test: list[int], num_classes: int) -> float:
    """Score of a task whose samples are all of one user; validation has what must not count."""
    samples = [(0, label, TRAIN) for label in train] + [(0, label, TEST) for label in test]
    samples += [(0, num_classes - 1, VALIDATION)] * 20
    return popularity_score(task_of(kind, samples, num_classes), sequences_of([[1, 2]], 3))


def test_accuracy_is_the_share_of_the_most_frequent_class() -> None:
    assert of_labels("label", [0, 1, 1], [1, 1, 0, 2], 3) == 2 / 4
    # Two classes are most frequent: each is first half of the time.
    assert of_labels("label", [0, 0, 1, 1, 2], [0, 1, 1, 2], 4) == 3 / 8


def test_mrr_of_known_counts() -> None:
    train = [4] * 5 + [3] * 4 + [2] * 3 + [1] * 2 + [0] * 1  # ranks: 4, 3, 2, 1, 0; then 5 to 9 share 6 to 10
    assert of_labels("item", train, [4, 3, 2, 1, 0, 9], 10) == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 6)
    # Without class 0 in training it shares the ranks 5 to 10 with the rest, of which one counts.
    assert of_labels("item", train[:-1], [0], 10) == pytest.approx(1 / 5 / 6)


def test_every_item_of_a_training_row_is_a_target_but_the_first() -> None:
    sequences = sequences_of([[1, 2, 3], [0, 2, 3], [4, 4, 4], [1, 1, 3]], 5)
    samples = [(0, 3, TRAIN), (1, 3, TRAIN), (2, 4, VALIDATION), (3, 3, TEST)]
    task = task_of("next_item", samples, 5)
    # 2 and 3 are asked for twice each and so share the first two ranks; 1, which stands first, is never asked for.
    assert popularity_score(task, sequences) == pytest.approx((1 + 1 / 2) / 2)
    # With a training row where 1 is asked for and the label is another, it is third.
    more = sequences_of([*sequences.items.tolist(), [3, 1, 2]], 5)
    task = task_of("next_item", [*samples[:3], (3, 1, TEST), (4, 2, TRAIN)], 5)
    assert popularity_score(task, more) == pytest.approx(1 / 3)


@given(st.sampled_from(["next_item", "item", "label"]), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_it_is_what_constant_logits_score(kind: TaskKind, num_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_items = num_classes if kind == "next_item" else 5
    rows = rng.integers(1, num_items, (12, 4))
    rows[np.arange(4) < rng.integers(0, 3, (12, 1))] = 0
    sequences = sequences_of(rows.tolist(), num_items)
    users = rng.permutation(12) if kind == "next_item" else rng.integers(0, 12, 30)
    labels = rows[users, -1] if kind == "next_item" else rng.integers(0, num_classes, len(users))
    split = np.arange(len(users)) % 3
    task = task_of(kind, list(zip(users.tolist(), labels.tolist(), split.tolist(), strict=True)), num_classes)
    counts = Counter[int]()
    for user, label, part in zip(users.tolist(), labels.tolist(), split.tolist(), strict=True):
        if part == TRAIN:
            counts.update([item for item in rows[user, 1:].tolist() if item] if kind == "next_item" else [label])
    test = labels[split == TEST]
    logits = np.array([[counts[label] for label in range(num_classes)]] * len(test))
    expected = mrr_at_k(*class_ranks(logits, test), 1 if kind == "label" else 5)
    assert popularity_score(task, sequences) == pytest.approx(expected)
