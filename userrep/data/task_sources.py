"""Task sets of data sets with events, items and profiles: MovieLens with its ratings, and the synthetic world.

Both are built straight from a source's tables, in memory. Nothing is left out without a count in `TaskSet.facts`.

Legend: `U` users with a sequence, `E` events, `N` samples of a task.
"""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userrep.config import ConfigError
from userrep.data.sources.source import Source, TableName
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.sources.world import build_world
from userrep.data.tasks import (
    MIN_ITEMS,
    PAD,
    ItemSequences,
    Task,
    TaskKind,
    TaskSet,
    TaskSplit,
    next_item_task,
    split_samples,
)
from userrep.schema import EVENTS, ITEMS, USERS

SCHEMAS = {"items": ITEMS, "events": EVENTS, "users": USERS}
MOVIELENS_LABELS = ("gender", "age", "occupation")
SYNTHETIC_LABELS = ("gender", "age_band")


def ml1m_tasks(
    source: Source, split: TaskSplit | None = None, max_items: int = 30, max_targets: int | None = None
) -> TaskSet:
    """Six tasks of MovieLens 1M.

    T1 next item of a user's most recent ratings below 4; T2 a movie that the user rated 4, T3 one rated 5, one sample
    per user and movie, whether rated before or after those of the sequence; T4 gender, T5 age band, T6 occupation.
    Classes of T2 and T3 are the movies that are a target of the task in any split, in the order of the item table.

    Source: arXiv 2306.01792, data set ML (tasks T1 to T3, 30 items). Differs: users are users and not stretches of 30
    events; users with fewer than two ratings below 4 are left out and counted; T4 to T6 are added.

    Args:
        source: `MovieLensSource` of the 1M archive, or a `ParquetSource` with ratings as values and the same labels.
        split: what to hold out; default: by user.
        max_items: L, positions of a sequence, >= 2.
        max_targets: of T2 and T3 the most recent ones of each user, >= 1; None: all.

    Raises:
        ConfigError: the source has no ratings, or lacks the profile labels.
    """
    log, split = _read(source), split or TaskSplit()
    if np.isnan(log.values).any():
        raise ConfigError(f"{np.isnan(log.values).sum()} events have no rating: T1 to T3 need one, give MovieLens data")
    builder = _Builder(log, log.values < 4, split, max_items)
    tasks = [
        next_item_task("T1", builder.sequences, split),
        builder.items("T2", log.values == 4, max_targets),
        builder.items("T3", log.values == 5, max_targets),
        *(builder.profile(f"T{number}", label) for number, label in enumerate(MOVIELENS_LABELS, 4)),
    ]
    return builder.task_set(tasks)


def synthetic_tasks(
    source: SyntheticSource, split: TaskSplit | None = None, max_items: int = 30, max_targets: int = 5
) -> TaskSet:
    """Six tasks of the synthetic world, from search over categories to the profile.

    T1 next query; T2 a product among the user's most recent purchases; T3 minor category (the topic) and T4 major
    category (the department) of the most recent purchase; T5 gender, T6 age band. Queries and purchases share nothing
    but the user's interests, and labels are noisy functions of these: see `sources.world`.

    Source: arXiv 2306.01792, the order of tasks of its data set NAVER Shopping. Differs: T2 is purchases, not later
    queries; six age bands; sizes are the source's.

    Args:
        source: the world and its users.
        split: what to hold out; default: by user.
        max_items: L, positions of a sequence, >= 2.
        max_targets: most recent purchases that T2 asks for, >= 1; one bought twice is one sample.
    """
    log, split = _read(source), split or TaskSplit()
    is_purchase = log.services == "shop"
    builder = _Builder(log, log.services == "search", split, max_items)
    world = build_world(source)
    users, bought = builder.recent(is_purchase, 1)
    digits = pc.utf8_slice_codeunits(log.item_ids.take(pa.array(bought)), len("shop-"), None)
    topics = world.topics_of(digits.cast(pa.int64()).to_numpy(zero_copy_only=False))
    topic_names = world.topic_words
    departments, department_names = world.department_of_topic[topics], world.department_words
    tasks = [
        next_item_task("T1", builder.sequences, split),
        builder.items("T2", is_purchase, max_targets),
        builder.task("T3", "label", users, topics, lambda code: topic_names[code]),
        builder.task("T4", "label", users, departments, lambda code: department_names[code]),
        *(builder.profile(f"T{number}", label) for number, label in enumerate(SYNTHETIC_LABELS, 5)),
    ]
    return builder.task_set(tasks)


class _Log(NamedTuple):
    """All tables of a source. Events are sorted by user, then time; ties keep the order of the source."""

    user_ids: pa.Array  # in the order in which events first name them
    item_ids: pa.Array  # of the item table
    item_texts: pa.Array
    users: np.ndarray  # of each event, its user's index
    items: np.ndarray  # of each event, its item's index
    services: np.ndarray
    values: np.ndarray  # NaN where there is none
    labels: dict[str, dict[str, str]]  # by user id
    facts: dict[str, int]


def _read(source: Source) -> _Log:
    facts: dict[str, int] = {}
    items, events, users = (_table(source, name, facts) for name in ("items", "events", "users"))
    references = pc.index_in(events["item_id"], items["item_id"])
    facts["events_of_unknown_items"] = references.null_count
    events, references = events.filter(references.is_valid()), references.drop_null().to_numpy()
    encoded = events["user_id"].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    times, positions = (events[name].fill_null(-1).to_numpy() for name in ("time", "position"))
    order = np.lexsort((positions, times, codes))
    labels = {row["user_id"]: dict(row["labels"]) for row in users.select(["user_id", "labels"]).to_pylist()}
    facts |= {
        "users": len(encoded.dictionary),
        "events": len(order),
        "repeated_profiles": users.num_rows - len(labels),  # the last one of a user is taken
    }
    return _Log(
        user_ids=encoded.dictionary,
        item_ids=items["item_id"].combine_chunks(),
        item_texts=items["text"].combine_chunks(),
        users=codes[order],
        items=references[order],
        services=events["service"].to_numpy()[order],
        values=events["value"].fill_null(np.nan).to_numpy()[order],
        labels=labels,
        facts=facts,
    )


def _table(source: Source, name: TableName, facts: dict[str, int]) -> pa.Table:
    parsed = [batch for part in source.parts(name) for batch in part()]
    facts[f"rejected_{name}"] = sum(batch.rejected.num_rows for batch in parsed)
    return pa.concat_tables([SCHEMAS[name].empty_table(), *(batch.rows for batch in parsed)])


class _Builder:
    """Sequences of a log's users, and tasks about them.

    Args:
        log: the source's tables.
        is_history: which events the sequences are made of, bool (E,).
        split: of every task.
        max_items: L, the most recent items are kept.

    Raises:
        ConfigError: max_items below 2, or no user with two such events.
    """

    def __init__(self, log: _Log, is_history: np.ndarray, split: TaskSplit, max_items: int) -> None:
        if max_items < MIN_ITEMS:
            raise ConfigError(f"max_items is {max_items}: a sequence needs at least {MIN_ITEMS}")
        self.log, self.split = log, split
        num_events = np.bincount(log.users[is_history], minlength=len(log.user_ids))
        has_row = num_events >= MIN_ITEMS
        if not has_row.any():
            raise ConfigError(f"none of {len(has_row)} users has {MIN_ITEMS} events for a sequence: give more data")
        self._row_of_user = np.where(has_row, np.cumsum(has_row) - 1, -1)
        self.facts = log.facts | {
            "users_without_history": int((num_events == 0).sum()),
            "users_with_one_item": int((num_events == 1).sum()),
            "sequences": int(has_row.sum()),
        }
        self.sequences = self._sequences(has_row, *self.recent(is_history, max_items), max_items)

    def _sequences(self, has_row: np.ndarray, rows: np.ndarray, items: np.ndarray, max_items: int) -> ItemSequences:
        used, numbers = np.unique(items, return_inverse=True)
        places = _from_end(rows)
        table = np.full((int(has_row.sum()), max_items), PAD, dtype=np.int32)
        table[rows, max_items - 1 - places] = numbers + 1
        return ItemSequences(
            items=table,
            user_ids=self.log.user_ids.filter(pa.array(has_row)),
            item_ids=("", *self.log.item_ids.take(pa.array(used)).to_pylist()),
            texts=("", *self.log.item_texts.take(pa.array(used)).to_pylist()),
        )

    def recent(self, is_wanted: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Row and item index of each row's most recent wanted events, oldest first, each (N,). None: all of them."""
        rows = self._row_of_user[self.log.users]
        wanted = np.flatnonzero(is_wanted & (rows >= 0))
        if limit is not None:
            wanted = wanted[_from_end(rows[wanted]) < limit]
        return rows[wanted], self.log.items[wanted]

    def items(self, name: str, is_target: np.ndarray, max_targets: int | None) -> Task:
        """Task `item`: each row's most recent target events, an item that is there twice counted once."""
        if max_targets is not None and max_targets < 1:
            raise ConfigError(f"max_targets is {max_targets}: ask for at least one, or for all by None")
        rows, items = self.recent(is_target, max_targets)
        num_items = len(self.log.item_ids)
        _, first = np.unique(rows * num_items + items, return_index=True)
        first.sort()
        self.facts[f"{name}_repeated_targets"] = len(rows) - len(first)
        return self.task(name, "item", rows[first], items[first], lambda item: self.log.item_ids[item].as_py())

    def profile(self, name: str, label: str) -> Task:
        """Task `label` on a profile label; classes are sorted by name."""
        values = [self.log.labels.get(user_id, {}).get(label) for user_id in self.sequences.user_ids.to_pylist()]
        rows = np.flatnonzero([value is not None for value in values])
        if not rows.size:
            known = sorted({key for labels in self.log.labels.values() for key in labels})
            raise ConfigError(f"no user has the label {label!r}: the profiles of this source hold {known}")
        names, codes = np.unique([value for value in values if value is not None], return_inverse=True)
        return self.task(name, "label", rows, codes, lambda code: str(names[code]))

    def task(
        self, name: str, kind: TaskKind, rows: np.ndarray, codes: np.ndarray, name_of: Callable[[int], str]
    ) -> Task:
        """A task whose classes are the codes that occur, in ascending order."""
        occurring, labels = np.unique(codes, return_inverse=True)
        self.facts[f"{name}_samples"] = len(rows)
        self.facts[f"{name}_users_without_sample"] = len(self.sequences.items) - len(np.unique(rows))
        classes = tuple(str(name_of(code)) for code in occurring.tolist())
        return Task(name, kind, rows, labels, classes, split_samples(rows, self.sequences.keys, self.split))

    def task_set(self, tasks: list[Task]) -> TaskSet:
        """The tasks with all counts."""
        return TaskSet(self.sequences, tuple(tasks), self.facts)


def _from_end(rows: np.ndarray) -> np.ndarray:
    """Of ascending rows (N,), how many equal ones come behind each, int64 (N,)."""
    return np.searchsorted(rows, rows, side="right") - 1 - np.arange(len(rows))
