from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.config import ConfigError
from userrep.data.split import SplitConfig, assign_splits, id_keys
from userrep.data.tasks import ItemSequences, Task, TaskSplit, next_item_task, noisy_task, split_samples


def sequences_of(num_users: int, length: int = 4, num_items: int = 9) -> ItemSequences:
    rng = np.random.default_rng(num_users)
    items = rng.integers(1, num_items, (num_users, length), dtype=np.int32)
    items[np.arange(length) < rng.integers(0, length - 1, (num_users, 1))] = 0
    ids = pa.array([f"u{n}" for n in range(num_users)])
    return ItemSequences(items, ids, ("", *(f"i{n}" for n in range(1, num_items))))


def user_keys(num_users: int) -> np.ndarray:
    return id_keys(pa.array([f"u{n}" for n in range(num_users)]))


@given(st.integers(3, 400), st.integers(0, 2**32 - 1), st.data())
def test_a_user_is_in_one_split_in_every_task_and_shares_are_exact(num_users: int, seed: int, data: st.DataObject):
    keys = user_keys(num_users)
    split = TaskSplit(seed=seed)
    of_user = dict(enumerate(split_samples(np.arange(num_users), keys, split).tolist()))
    sizes = [list(of_user.values()).count(index) for index in range(3)]
    for size, share in zip(sizes[1:], (split.validation, split.test), strict=True):
        assert abs(size - share * num_users) <= 0.5 or size == 1
    # Another task, with other users in another order and several samples of a user.
    rows = np.array(data.draw(st.lists(st.integers(0, num_users - 1), max_size=30)), dtype=np.int64)
    assert split_samples(rows, keys, split).tolist() == [of_user[row] for row in rows.tolist()]
    # The order in which the users stand does not matter, nor that one of them stands there twice.
    shuffled = np.random.default_rng(seed).permutation(num_users)
    again = np.concatenate([keys[shuffled], keys[:1]])
    expected = [of_user[row] for row in [*shuffled.tolist(), 0]]
    assert split_samples(np.arange(num_users + 1), again, split).tolist() == expected


def test_users_move_with_the_seed():
    rows, keys = np.arange(10_000), user_keys(10_000)
    first, second = (split_samples(rows, keys, TaskSplit(seed=seed)) for seed in (0, 1))
    expected = 0.8**2 + 0.05**2 + 0.15**2  # how often two independent splits agree
    assert abs((first == second).mean() - expected) <= 6 * (expected * (1 - expected) / len(rows)) ** 0.5


@pytest.mark.parametrize("seed", [0, 7])
def test_users_that_ingest_holds_out_are_held_out_of_tasks_too(seed: int):
    keys = user_keys(3000)
    of_ingest = assign_splits(keys, SplitConfig(seed=seed))
    of_tasks = split_samples(np.arange(3000), keys, TaskSplit(seed=seed))
    assert (of_ingest == 2).sum() > 0
    assert (of_tasks[of_ingest == 2] == 2).all()


@given(st.integers(10, 700), st.integers(0, 2**32 - 1))
def test_split_by_sample_is_the_published_one(num_samples: int, seed: int):
    """Slices of a permutation as papers and code state them: dev index -0.2 N, then three quarters of it."""
    samples = np.arange(num_samples)
    np.random.seed(seed)
    shuffled = samples[np.random.permutation(samples)]
    dev = -int(0.2 * float(num_samples))
    test = int(dev * 0.75)
    expected = np.full(num_samples, -1)
    for index, part in enumerate((shuffled[:dev], shuffled[dev:test], shuffled[test:])):
        expected[part] = index
    rows = samples // 3  # of users with three targets each
    assert split_samples(rows, user_keys(num_samples), TaskSplit(by="sample", seed=seed)).tolist() == expected.tolist()


def test_too_few_to_split():
    with pytest.raises(ValueError, match="2 users are too few"):
        split_samples(np.arange(2), user_keys(2), TaskSplit())
    with pytest.raises(ConfigError, match="leave nothing to train on"):
        TaskSplit.parse({"validation": 0.5, "test": 0.5})
    with pytest.raises(ValueError, match=r"T1 has samples .*'test': 0.*take more users"):
        next_item_task("T1", sequences_of(5), TaskSplit(by="sample"))


def test_first_task_asks_for_the_last_item_of_every_user():
    sequences = sequences_of(40)
    task = next_item_task("T1", sequences, TaskSplit())
    assert task.kind == "next_item"
    assert task.metric == "mrr_at_5"
    assert task.num_classes == sequences.num_items == 9
    assert task.classes[1] == "i1"
    for sample, (row, label) in enumerate(zip(task.rows.tolist(), task.labels.tolist(), strict=True)):
        assert row == sample
        assert label == [item for item in sequences.items[row].tolist() if item][-1]
    parts = [task.samples(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [32, 2, 6]
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_noise_tells_nothing(share: float):
    sequences, split = sequences_of(2000), TaskSplit(seed=3)
    task = noisy_task(sequences, split, seed=1, share=share)
    assert task.metric == "accuracy"
    assert len(task.rows) == len(set(task.rows.tolist())) == round(2000 * share)
    assert task.num_classes == 50
    counts = np.bincount(task.labels, minlength=50)
    mean = len(task.rows) / 50
    assert np.abs(counts - mean).max() <= 6 * mean**0.5
    of_user = next_item_task("T1", sequences, split).split
    assert (task.split == of_user[task.rows]).all()
    again, other = noisy_task(sequences, split, 1, share), noisy_task(sequences, split, 2, share)
    assert (again.rows == task.rows).all()
    assert (again.labels == task.labels).all()
    agreement = (other.labels == task.labels).mean()
    assert agreement <= 0.02 + 6 * (0.02 * 0.98 / len(task.rows)) ** 0.5


@pytest.mark.parametrize("values", [{"share": 0}, {"share": 1.1}, {"num_classes": 0}])
def test_noise_that_is_none(values: dict[str, Any]):
    with pytest.raises(ValueError, match="use a share in"):
        noisy_task(sequences_of(20), TaskSplit(), 0, **values)


@pytest.mark.parametrize(
    ("items", "problem"),
    [
        ([[0, 1, 2], [1, 0, 2]], "row 1 and 0 others"),
        ([[0, 0, 2], [1, 2, 0]], "row 0 and 1 others"),
        ([[0, 0, 0], [0, 1, 2]], "row 0 and 0 others"),
        ([[0, 1, 4], [0, 1, 2]], r"must be in \[0, 4\)"),
        ([[0, 1, -1], [0, 1, 2]], r"must be in \[0, 4\)"),
        ([[0, 1, 2]], r"int32 \(1, 3\) of 2 users"),
    ],
)
def test_sequences_that_a_backbone_would_misread(items: list[list[int]], problem: str):
    with pytest.raises(ValueError, match=problem):
        ItemSequences(np.array(items, dtype=np.int32), pa.array(["a", "b"]), ("", "x", "y", "z"))


def test_sequences_of_another_shape():
    good = sequences_of(3)
    with pytest.raises(ValueError, match="int64"):
        replace(good, items=good.items.astype(np.int64))
    with pytest.raises(ValueError, match="8 texts of 9 items"):
        replace(good, texts=("",) * 8)


def test_tasks_that_do_not_fit():
    good = next_item_task("T1", sequences_of(30), TaskSplit())
    with pytest.raises(ValueError, match=r"task T1: rows \(30,\), labels \(29,\)"):
        replace(good, labels=good.labels[1:])
    with pytest.raises(ValueError, match=r"labels must be in \[0, 2\)"):
        replace(good, classes=("a", "b"))
    with pytest.raises(ValueError, match="'validation': 0"):
        Task("T1", "label", good.rows, good.labels, good.classes, np.where(good.split == 1, 0, good.split))
