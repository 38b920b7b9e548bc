"""From a log of events to tasks: sequences of its users, and questions about them.

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
from userrep.data.assemble import NO_TIME
from userrep.data.sources.source import Source, TableName
from userrep.data.tasks import (
    MIN_ITEMS,
    PAD,
    ItemSequences,
    Task,
    TaskKind,
    TaskSet,
    TaskSplit,
    split_samples,
)
from userrep.schema import EVENTS, ITEMS, USERS

SCHEMAS = {"items": ITEMS, "events": EVENTS, "users": USERS}


class EventLog(NamedTuple):
    """What is known of users. Events are sorted by user, then time; of unknown time first."""

    user_ids: pa.Array
    item_ids: pa.Array  # of the item table
    item_texts: pa.Array
    users: np.ndarray  # of each event, its user's index
    items: np.ndarray  # of each event, its item's index
    services: np.ndarray
    values: np.ndarray  # NaN where there is none
    labels: dict[str, dict[str, str]]  # by user id
    facts: dict[str, int]


def read_log(source: Source) -> EventLog:
    """All tables of a source, in memory."""
    facts: dict[str, int] = {}
    items, events, users = (_table(source, name, facts) for name in ("items", "events", "users"))
    references = pc.index_in(events["item_id"], items["item_id"])
    facts["events_of_unknown_items"] = references.null_count
    events, references = events.filter(references.is_valid()), references.drop_null().to_numpy()
    encoded = events["user_id"].combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy()
    times = events["time"].fill_null(NO_TIME).to_numpy()
    positions = events["position"].fill_null(-1).to_numpy()
    order = np.lexsort((positions, times, codes))
    labels = {row["user_id"]: dict(row["labels"]) for row in users.select(["user_id", "labels"]).to_pylist()}
    facts |= {
        "users": len(encoded.dictionary),
        "events": len(order),
        "repeated_profiles": users.num_rows - len(labels),  # the last one of a user is taken
    }
    return EventLog(
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


class TaskBuilder:
    """Sequences of a log's users, and tasks about them.

    Args:
        log: the source's tables.
        is_history: which events the sequences are made of, bool (E,).
        split: what every task holds out; or the split of each user of the log, int8.
        max_items: L, the most recent items are kept.

    Raises:
        ConfigError: max_items below 2, or no user with two such events.
    """

    def __init__(self, log: EventLog, is_history: np.ndarray, split: TaskSplit | np.ndarray, max_items: int) -> None:
        if max_items < MIN_ITEMS:
            raise ConfigError(f"max_items is {max_items}: a sequence needs at least {MIN_ITEMS}")
        self.log = log
        num_events = np.bincount(log.users[is_history], minlength=len(log.user_ids))
        has_row = num_events >= MIN_ITEMS
        if not has_row.any():
            raise ConfigError(f"none of {len(has_row)} users has {MIN_ITEMS} events for a sequence: give more data")
        self._split = split if isinstance(split, TaskSplit) else split[has_row]
        self._row_of_user = np.where(has_row, np.cumsum(has_row) - 1, -1)
        self.facts = log.facts | {
            "users_without_history": int((num_events == 0).sum()),
            "users_with_one_item": int((num_events == 1).sum()),
            "sequences": int(has_row.sum()),
        }
        self.sequences = self._sequences(has_row, *self.recent(is_history, max_items), max_items)

    def _sequences(self, has_row: np.ndarray, rows: np.ndarray, items: np.ndarray, max_items: int) -> ItemSequences:
        used, numbers = np.unique(items, return_inverse=True)
        return ItemSequences(
            items=left_padded(rows, numbers + 1, int(has_row.sum()), max_items),
            user_ids=self.log.user_ids.filter(pa.array(has_row)),
            item_ids=("", *self.log.item_ids.take(pa.array(used)).to_pylist()),
            texts=("", *self.log.item_texts.take(pa.array(used)).to_pylist()),
        )

    def recent(self, is_wanted: np.ndarray, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Row and item index of each row's most recent wanted events, oldest first, each (N,). None: all of them."""
        rows = self._row_of_user[self.log.users]
        wanted = np.flatnonzero(is_wanted & (rows >= 0))
        if limit is not None:
            wanted = wanted[places_from_end(rows[wanted]) < limit]
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
        return Task(name, kind, rows, labels, classes, self._split_of(rows))

    def next_item(self, name: str) -> Task:
        """Task `next_item`: all users, each item of a sequence from those before it."""
        rows = np.arange(len(self.sequences.items))
        labels = self.sequences.items[:, -1].astype(np.int64)
        return Task(name, "next_item", rows, labels, self.sequences.item_ids, self._split_of(rows))

    def _split_of(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self._split, TaskSplit):
            return split_samples(rows, self.sequences.keys, self._split)
        return self._split[rows]

    def task_set(self, tasks: list[Task]) -> TaskSet:
        """The tasks with all counts."""
        return TaskSet(self.sequences, tuple(tasks), self.facts)


def left_padded(rows: np.ndarray, items: np.ndarray, num_rows: int, max_items: int) -> np.ndarray:
    """Table of item numbers, int32 (num_rows, max_items), 0 on the left of each row's items.

    Args:
        rows: row of each item, ascending, (N,).
        items: item numbers from 1, in the order in which they stand in their row; at most `max_items` of a row.
        num_rows: of the table.
        max_items: its columns.
    """
    table = np.full((num_rows, max_items), PAD, dtype=np.int32)
    table[rows, max_items - 1 - places_from_end(rows)] = items
    return table


def places_from_end(rows: np.ndarray) -> np.ndarray:
    """Of ascending rows (N,), how many equal ones come behind each, int64 (N,)."""
    return np.searchsorted(rows, rows, side="right") - 1 - np.arange(len(rows))
