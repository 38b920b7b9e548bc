"""Tasks of continual learning: who is asked what, over one table of item sequences; and how samples are split.

Every task asks about rows of the same sequences, so that a task can be added to a finished model, and any order of the
tasks is a permutation of a tuple. Where the tasks of a data set come from is in `task_sources.py`,
`shard_tasks.py` and `ttl.py`.

Legend: `U` users (rows), `L` positions, `V` items including the pad, `N` samples of a task.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from userrep.config import Config
from userrep.data.split import SPLITS, id_keys, mix

PAD = 0  # item number of the places before a sequence
MIN_ITEMS = 2  # of a sequence: the first task predicts its last item, from one item at the least
ROUNDING = 1e-9  # what a quotient of decimal shares may be off by: .15 / .2 is less than .75

TaskKind = Literal["next_item", "item", "label", "vector"]
Metric = Literal["mrr_at_5", "accuracy", "recall_at_10"]
METRICS: dict[TaskKind, Metric] = {
    "next_item": "mrr_at_5",
    "item": "mrr_at_5",
    "label": "accuracy",
    "vector": "recall_at_10",
}


class TaskSplit(Config):
    """What is held out of the tasks.

    `user`: a user is in the same split in every task, whatever the order of tasks. Shares are of the users of the
    sequences, exact up to rounding and at least one user each. Users are ordered as in `split.assign_splits`, the test
    users first: with the same seed, of two test shares the smaller one is part of the larger one.

    `sample`: every task is split on its own, and a user with several targets can be in all three splits. For
    comparison with published figures only.
    Source: Sein-Kim/TERACON@b48e074:train_teracon.py (train first, then validation, then test of a permutation of
    numpy's legacy generator). Differs: a split without a sample is an error, not the whole set.
    """

    by: Literal["user", "sample"] = "user"
    seed: int = Field(default=0, ge=0, lt=2**32)
    validation: float = Field(default=0.05, gt=0, lt=1)
    test: float = Field(default=0.15, gt=0, lt=1)

    @model_validator(mode="after")
    def _leaves_training_users(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation} + test {self.test} leave nothing to train on: lower them")
        return self


@dataclass(frozen=True, eq=False)
class ItemSequences:
    """What is known of every user: the most recent items, oldest first.

    Attributes:
        items: item numbers, int32 (U, L); 0 pads on the left, and each row has at least two items.
        user_ids: strings (U,), distinct.
        item_ids: id of each item number, (V,); the pad's is empty.
        texts: item_text of each item number, (V,), the pad's is empty; None where the data set has no texts.

    Raises:
        ValueError: shapes that do not fit, or a row that is not as stated.
    """

    items: np.ndarray
    user_ids: pa.Array
    item_ids: tuple[str, ...]
    texts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Refuses rows that a backbone would misread."""
        if self.items.ndim != 2 or self.items.dtype != np.int32 or len(self.items) != len(self.user_ids):
            raise ValueError(
                f"items are {self.items.dtype} {self.items.shape} of {len(self.user_ids)} users: int32 (U, L) is needed"
            )
        if not self.items.size or self.items.min() < 0 or self.items.max() >= self.num_items:
            raise ValueError(f"item numbers must be in [0, {self.num_items}), of one user at least")
        bad = np.flatnonzero(~is_left_padded(self.items) | ((self.items != PAD).sum(axis=1) < MIN_ITEMS))
        if bad.size:
            raise ValueError(
                f"row {bad[0]} and {bad.size - 1} others do not end with {MIN_ITEMS} items or have a pad (0) behind an "
                "item: pad on the left and leave shorter sequences out"
            )
        if self.texts is not None and len(self.texts) != self.num_items:
            raise ValueError(f"{len(self.texts)} texts of {self.num_items} items: give each one, the pad included")

    @property
    def num_items(self) -> int:
        """V, the pad included."""
        return len(self.item_ids)

    @cached_property
    def keys(self) -> np.ndarray:
        """64-bit keys of the users, uint64 (U,)."""
        return id_keys(self.user_ids)


@dataclass(frozen=True, eq=False)
class Task:
    """Questions about users, each with its one right class.

    `next_item`: every position of a sequence predicts the item after it; the label is the last item, which is what
    counts in evaluation. `item`: an item that the user chose, numbered for this task alone. `label`: any other class.
    `vector`: nothing is asked; the user vector of a pretrained backbone is to find the later half of a sequence among
    those of other users, given the earlier one. Its one class has no meaning.

    Attributes:
        name: how results refer to it.
        kind: see above.
        rows: row of ItemSequences of each sample, int64 (N,).
        labels: class of each sample, int64 (N,), in [0, num_classes).
        classes: name of each class; of `next_item`, the item ids, so that class 0 is the pad.
        split: 0 train, 1 validation, 2 test; int8 (N,).

    Raises:
        ValueError: shapes or labels that do not fit, or a split without a sample.
    """

    name: str
    kind: TaskKind
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    split: np.ndarray

    def __post_init__(self) -> None:
        """Refuses what could not be trained or measured."""
        if not self.rows.shape == self.labels.shape == self.split.shape == (len(self.rows),):
            shapes = f"rows {self.rows.shape}, labels {self.labels.shape}, split {self.split.shape}"
            raise ValueError(f"task {self.name}: {shapes} must all be (N,)")
        if self.labels.size and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            raise ValueError(f"task {self.name}: labels must be in [0, {self.num_classes})")
        sizes = {name: len(self.samples(name)) for name in SPLITS}
        if not all(sizes.values()):
            raise ValueError(f"task {self.name} has samples {sizes}: every split needs one, take more users")

    @property
    def num_classes(self) -> int:
        """Classes that a prediction is ranked among."""
        return len(self.classes)

    @property
    def metric(self) -> Metric:
        """What the task is measured by."""
        return METRICS[self.kind]

    def samples(self, split: str) -> np.ndarray:
        """Positions of the samples of `train`, `validation` or `test`, int64, ascending."""
        return np.flatnonzero(self.split == SPLITS.index(split))


@dataclass(frozen=True, eq=False)
class TaskSet:
    """The tasks of a data set in the order in which they are learned by default.

    Attributes:
        sequences: of all users.
        tasks: the first one learned first.
        facts: counts of what the tasks hold and of what was left out of them.
    """

    sequences: ItemSequences
    tasks: tuple[Task, ...]
    facts: dict[str, int]


def split_samples(rows: np.ndarray, keys: np.ndarray, split: TaskSplit) -> np.ndarray:
    """Split of each sample of a task, int8 (N,): 0 train, 1 validation, 2 test.

    Args:
        rows: row of each sample, (N,).
        keys: of the users of all rows, uint64 (U,), so that every task sees the same users; equal keys are one user.
        split: what to hold out.

    Raises:
        ValueError: too few users to train on.
    """
    if split.by == "sample":
        held_out = int((split.validation + split.test) * len(rows))
        num_test = int(held_out * (split.test / (split.validation + split.test)) + ROUNDING)
        order = np.random.RandomState(split.seed).permutation(len(rows))  # the one that is published
        return _deal(order[::-1], num_test, held_out - num_test)
    users, user_of_row = np.unique(keys, return_inverse=True)
    num_test, num_validation = (max(1, round(share * len(users))) for share in (split.test, split.validation))
    if num_test + num_validation >= len(users):
        raise ValueError(f"{len(users)} users are too few to hold some out and to train on others: take more users")
    return _deal(np.argsort(mix(users, split.seed)), num_test, num_validation)[user_of_row][rows]


def _deal(order: np.ndarray, num_test: int, num_validation: int) -> np.ndarray:
    """The first of `order` are for test, the next for validation, the rest for training, int8 (len(order),)."""
    dealt = np.zeros(len(order), dtype=np.int8)
    dealt[order[:num_test]] = SPLITS.index("test")
    dealt[order[num_test : num_test + num_validation]] = SPLITS.index("validation")
    return dealt


def next_item_task(name: str, sequences: ItemSequences, split: TaskSplit) -> Task:
    """The first task: all users, each item of a sequence from those before it."""
    rows = np.arange(len(sequences.items))
    labels = sequences.items[:, -1].astype(np.int64)
    return Task(name, "next_item", rows, labels, sequences.item_ids, split_samples(rows, sequences.keys, split))


def vector_task(name: str, sequences: ItemSequences, split: np.ndarray) -> Task:
    """The first task of a pretrained backbone: all users.

    Args:
        name: of the task.
        sequences: of all users.
        split: of each row, int8 (U,).
    """
    rows = np.arange(len(sequences.items))
    return Task(name, "vector", rows, np.zeros_like(rows), ("",), split)


def noisy_task(
    sequences: ItemSequences, split: TaskSplit | np.ndarray, seed: int, share: float = 0.5, num_classes: int = 50
) -> Task:
    """A task that nothing can be learned from: random labels of random users.

    Source: arXiv 2306.01792, the experiment with a noisy task (50% of users, 50 classes). Differs: none.

    Args:
        sequences: whose users are drawn.
        split: as of the other tasks; or the split of each row, int8 (U,).
        seed: of users and labels.
        share: of the users, in (0, 1].
        num_classes: labels are uniform over [0, num_classes).
    """
    if not 0 < share <= 1 or num_classes < 1:
        raise ValueError(f"share {share}, num_classes {num_classes}: use a share in (0, 1] and at least one class")
    rng, num_users = np.random.default_rng(seed), len(sequences.items)
    rows = np.sort(rng.choice(num_users, round(share * num_users), replace=False))
    labels = rng.integers(0, num_classes, len(rows))
    classes = tuple(map(str, range(num_classes)))
    parts = split_samples(rows, sequences.keys, split) if isinstance(split, TaskSplit) else split[rows]
    return Task("noise", "label", rows, labels, classes, parts)


def is_left_padded(items: np.ndarray) -> np.ndarray:
    """Which rows of item numbers (U, L) have no pad behind an item, bool (U,)."""
    is_item = items != PAD
    return ~(is_item[:, :-1] & ~is_item[:, 1:]).any(axis=1)
