"""Next-item recommendation by leave-one-out: the last event of a user tests, the one before it validates.

Whose events stand where is a function of the ids alone, so it does not depend on how users were dealt to shards.

Source: Kang and McAuley, arXiv 1808.09781; cold and in-set items: arXiv 2305.13731.
Differs: users with fewer than three events are not dropped, but train.

Legend: `N` users, `A` asked users, those with at least three events, `E` events, `I` items, `T` tokens of the items.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userrep.data.assemble import NO_TIME
from userrep.data.batch import gather_ranges
from userrep.data.split import unit_interval
from userrep.data.views import RowGroup, manifest_row_groups, merge_row_groups, read_row_group

Held = Literal["validation", "test"]
FROM_END = {"test": 1, "validation": 2}  # place of the target, counted from the last event
MIN_EVENTS = 3  # one to learn from, one to validate, one to test


@dataclass(frozen=True)
class Sequences:
    """Item sequences one after another, oldest item first.

    Attributes:
        items: item numbers of all sequences, int32 (E,).
        offsets: borders of the sequences in `items`, int64 (number of sequences + 1,).
    """

    items: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Items of each sequence, int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Sequences":
        """Some sequences, in the order given."""
        return Sequences(*self._gather(self.offsets[rows], self.lengths[rows]))

    def recent(self, max_items: int) -> "Sequences":
        """All sequences, of each the last `max_items` >= 1 items."""
        kept = np.minimum(self.lengths, max_items)
        return Sequences(*self._gather(self.offsets[1:] - kept, kept))

    def padded(self, width: int) -> np.ndarray:
        """One row per sequence, 1 + item from the left and 0 behind its end, int64 (number of sequences, width).

        Raises:
            ValueError: a sequence is longer than `width`.
        """
        longest = int(self.lengths.max(initial=0))
        if longest > width:
            raise ValueError(f"a sequence of {longest} items does not fit in rows of {width}: call recent({width})")
        rows = np.zeros((len(self), width), dtype=np.int64)
        rows[np.arange(width) < self.lengths[:, None]] = self.items + 1
        return rows

    def _gather(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        positions, offsets = gather_ranges(starts, lengths)
        return self.items[positions], offsets


@dataclass(frozen=True)
class LeaveOneOut:
    """Users by rising key with their events of all services, and the catalogue of all items that have events.

    Attributes:
        user_ids: (N,).
        keys: 64-bit keys of the users, ascending, uint64 (N,).
        events: of each user, as `recent_items` in `userrep/task_vectors.py` orders them; E is their number.
        item_ids: of the catalogue, ascending (I,); an item's number is its place here.
        tokens: of all items, one after another, int32 (T,).
        token_offsets: borders of the items in `tokens`, int64 (I + 1,).
    """

    user_ids: pa.Array
    keys: np.ndarray
    events: Sequences
    item_ids: pa.Array
    tokens: np.ndarray
    token_offsets: np.ndarray

    def __len__(self) -> int:
        """Number of users N."""
        return len(self.keys)

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return len(self.item_ids)

    @cached_property
    def asked(self) -> np.ndarray:
        """Positions of the users with at least three events, ascending int64 (A,)."""
        return np.flatnonzero(self.events.lengths >= MIN_EVENTS)

    @cached_property
    def train(self) -> Sequences:
        """Training history of every user: without the last two events of asked users, all events of the others."""
        lengths = self.events.lengths
        return self._first_events(np.arange(len(self)), np.where(lengths >= MIN_EVENTS, lengths - 2, lengths))

    def targets(self, held: Held) -> np.ndarray:
        """The held-out item of each asked user, int32 (A,)."""
        return self.events.items[self.events.offsets[self.asked + 1] - FROM_END[held]]

    def histories(self, held: Held) -> Sequences:
        """What each asked user did before the held-out event, A sequences; before the test also what validates."""
        return self._first_events(self.asked, self.events.lengths[self.asked] - FROM_END[held])

    def train_share(self, share: float, seed: int) -> np.ndarray:
        """A share of the users, to train on these alone; with one seed, a smaller share is part of a larger one.

        Args:
            share: in (0, 1]; rounded up to a whole number of users.
            seed: which users.

        Returns:
            Positions, ascending int64.

        Raises:
            ValueError: a share out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share {share} of the training users is not in (0, 1]: 0.05 takes 5% of them")
        order = np.argsort(unit_interval(self.keys, seed), kind="stable")
        return np.sort(order[: int(np.ceil(share * len(self)))])

    def train_counts(self, users: np.ndarray | None = None) -> np.ndarray:
        """How often each item occurs in the training histories of some users (default: all), int64 (I,)."""
        sequences = self.train if users is None else self.train.take(users)
        return np.bincount(sequences.items, minlength=self.num_items)

    def is_cold(self, held: Held = "test", users: np.ndarray | None = None) -> np.ndarray:
        """Whose held-out item occurs in no training history of `users` (default: all), bool (A,); else it is in-set."""
        return self.train_counts(users)[self.targets(held)] == 0

    def _first_events(self, users: np.ndarray, lengths: np.ndarray) -> Sequences:
        positions, offsets = gather_ranges(self.events.offsets[users], lengths)
        return Sequences(self.events.items[positions], offsets)


def load_leave_one_out(directory: Path, shards: list[dict[str, Any]]) -> LeaveOneOut:
    """All users of tokenized shards; all of them are in memory.

    Args:
        directory: tokenized shards.
        shards: their facts in the manifest.

    Raises:
        ValueError: no user has three events, so nobody can be asked.
    """
    groups = [read_row_group(directory, shard, number) for shard, number, _ in manifest_row_groups(shards)]
    found = _by_id(merge_row_groups(groups)[0]) if groups else None
    if found is None or not len(found.asked):
        raise ValueError(
            f"no user in {directory} has {MIN_EVENTS} events, and leave-one-out trains on one, validates on one and "
            "tests on one: ingest more events"
        )
    return found


def _by_id(group: RowGroup) -> LeaveOneOut:
    """Users sorted by key (of equal keys by id), their events by time, items sorted by id."""
    by_id = pc.array_sort_indices(group.item_ids).to_numpy()
    number = np.empty(len(by_id), dtype=np.int32)
    number[by_id] = np.arange(len(by_id))
    positions, token_offsets = gather_ranges(group.token_offsets[by_id], np.diff(group.token_offsets)[by_id])
    id_order = np.empty(len(group.keys), dtype=np.int64)
    id_order[pc.array_sort_indices(group.user_ids).to_numpy()] = np.arange(len(group.keys))
    users = np.lexsort([id_order, group.keys])
    place = np.empty(len(users), dtype=np.int64)
    place[users] = np.arange(len(users))
    num_events = np.diff(group.history_offsets[group.user_offsets])
    return LeaveOneOut(
        user_ids=group.user_ids.take(pa.array(users)),
        keys=group.keys[users],
        events=Sequences(number[group.items[_event_order(group, place)]], np.append(0, np.cumsum(num_events[users]))),
        item_ids=group.item_ids.take(pa.array(by_id)),
        tokens=group.tokens[positions],
        token_offsets=token_offsets,
    )


def _event_order(group: RowGroup, place: np.ndarray) -> np.ndarray:
    """Positions of all events: by the place of their user, unknown times first, by time, service, place in history."""
    counts_H = np.diff(group.history_offsets)
    users_E = np.repeat(np.repeat(place, np.diff(group.user_offsets)), counts_H)
    times_E = group.times.fill_null(NO_TIME).to_numpy()
    return np.lexsort([np.arange(len(users_E)), np.repeat(group.services, counts_H), times_E, users_E])
