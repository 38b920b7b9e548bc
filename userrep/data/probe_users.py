"""Users by whom encoders are probed: whole histories, profile labels, and the last event, which is to be foretold.

Which users, and what is asked about them, is a function of the shards alone, so it is the same for every encoder.

Legend: `N` users, `H` histories that are encoded for some of them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse

from userrep.data.assemble import NO_TIME, users_file
from userrep.data.batch import HistoryBatch, compact, gather_ranges
from userrep.data.selection import select_users
from userrep.data.split import SPLITS
from userrep.data.views import RowGroup, manifest_row_groups, merge_row_groups, read_row_group

MIN_LABELLED = 50  # training users, below which a label is not asked for
MIN_PER_CLASS = 10  # of them, on average: a label that names users (a postcode, a name) asks for what cannot be learned
UNKNOWN = -1  # class of a user without the label


@dataclass(frozen=True)
class ProbeLabel:
    """A profile label.

    Attributes:
        classes: values that training users have, sorted.
        labels: class of every user, int64 (N,); `UNKNOWN` where it is unknown, or no training user has it.
    """

    classes: tuple[str, ...]
    labels: np.ndarray


@dataclass(frozen=True)
class ProbeBatch:
    """Histories of some users, once, and which of them a user is the mean of.

    Attributes:
        histories: with all items, once.
        whole: row of ones per user over all histories, float32 (N, H).
        before: the same over what came before the user's last event; without ones where nothing did.
    """

    histories: HistoryBatch
    whole: scipy.sparse.csr_matrix
    before: scipy.sparse.csr_matrix


@dataclass(frozen=True)
class ProbeUsers:
    """Users in the order of the shards.

    Attributes:
        group: the users and their histories, cut to the most recent events.
        labels: by name.
        targets: position in `group.items` of each user's last event, int64 (N,).
        max_events: most events of a history that a batch can show.
    """

    group: RowGroup
    labels: dict[str, ProbeLabel]
    targets: np.ndarray
    max_events: int

    def __len__(self) -> int:
        """Number of users N."""
        return len(self.group.keys)

    @property
    def is_train(self) -> np.ndarray:
        """Users to train a probe on, bool (N,); the others are held out."""
        return self.group.splits == SPLITS.index("train")

    @property
    def has_before(self) -> np.ndarray:
        """Users who did something before their last event, bool (N,)."""
        return np.diff(self.group.history_offsets[self.group.user_offsets]) > 1

    def num_events(self, max_events: int) -> np.ndarray:
        """Events of each user that a batch shows, int64 (N,)."""
        shown_H = np.minimum(np.diff(self.group.history_offsets), max_events)
        return np.add.reduceat(shown_H, self.group.user_offsets[:-1])

    def batch(
        self, start: int, stop: int, max_events: int, is_whole: bool = True, is_before: bool = True
    ) -> ProbeBatch:
        """Users [start, stop), every history with the most recent `max_events` events.

        Histories that the last event is not in stand for both the whole user and the user before it.

        Args:
            start: first user.
            stop: one after the last user.
            max_events: >= 1.
            is_whole: False leaves the histories out that only `whole` needs.
            is_before: likewise for `before`.

        Raises:
            ValueError: the users were loaded with fewer events than `max_events`.
        """
        if not 1 <= max_events <= self.max_events:
            raise ValueError(
                f"max_events is {max_events}: these users were loaded with {self.max_events} events of a history, "
                "load them with the most that any encoder is shown"
            )
        group, size = self.group, stop - start
        histories = np.arange(group.user_offsets[start], group.user_offsets[stop])
        users = np.repeat(np.arange(size), np.diff(group.user_offsets[start : stop + 1]))
        starts, stops = group.history_offsets[histories], group.history_offsets[histories + 1]
        targets = self.targets[start:stop][users]
        is_last = (starts <= targets) & (targets < stops)  # the history that ends in the user's last event
        cut = np.flatnonzero(is_last & (targets > starts))
        every = np.ones(len(cut), dtype=bool)
        in_whole = is_whole & np.concatenate([np.ones_like(is_last), ~every])
        in_before = is_before & np.concatenate([~is_last, every])
        kept = in_whole | in_before
        starts, stops = np.concatenate([starts, starts[cut]])[kept], np.concatenate([stops, targets[cut]])[kept]
        lengths = np.minimum(stops - starts, max_events)
        positions, offsets = gather_ranges(stops - lengths, lengths)
        references, tokens, token_offsets, items = compact(group.items[positions], group.tokens, group.token_offsets)
        keys = group.item_keys[items].view(np.int64)
        batch = HistoryBatch(tokens, token_offsets, references, offsets.astype(np.int32), keys)
        rows = np.concatenate([users, users[cut]])[kept]
        whole, before = (_membership(rows, is_in[kept], size) for is_in in (in_whole, in_before))
        return ProbeBatch(batch, whole, before)


def load_probe_users(
    directory: Path, shards: list[dict[str, Any]], num_train: int, num_test: int, max_events: int
) -> ProbeUsers:
    """The first training users and the first held-out ones (validation and test), fewer where there are fewer.

    Memory holds one row group, and of the users what is kept.

    Args:
        directory: tokenized shards.
        shards: their facts in the manifest.
        num_train: training users, >= 1.
        num_test: held-out users, >= 1.
        max_events: of each history, the most that any encoder is shown; one more is kept, to be foretold.

    Raises:
        ValueError: an argument below 1, or no user of one of the kinds.
    """
    if min(num_train, num_test, max_events) < 1:
        raise ValueError(f"{num_train} training users, {num_test} test users, {max_events} events: all must be >= 1")
    missing = np.array([num_train, num_test])
    groups, profiles = list[RowGroup](), list[dict[str, str]]()
    for shard, number, _ in manifest_row_groups(shards):
        if not missing.any():
            break
        group = read_row_group(directory, shard, number)
        is_held_out = group.splits != SPLITS.index("train")
        chosen = [np.flatnonzero(is_held_out == kind)[: missing[kind]] for kind in (0, 1)]
        missing -= [len(users) for users in chosen]
        users = np.sort(np.concatenate(chosen))
        if len(users):
            groups.append(select_users(group, users, max_events + 1))
            profiles += _read_profiles(directory, shard, number, users)
    if missing[0] == num_train or missing[1] == num_test:
        raise ValueError(
            f"{directory} has {num_train - missing[0]} training users and {num_test - missing[1]} held-out ones: a "
            "probe needs both; hold out more or fewer users (ingest.split)"
        )
    merged, _ = merge_row_groups(groups)
    labels = _labels(profiles, merged.splits == SPLITS.index("train"))
    return ProbeUsers(merged, labels, _last_events(merged), max_events)


def _membership(rows: np.ndarray, is_in: np.ndarray, num_rows: int) -> scipy.sparse.csr_matrix:
    columns = np.flatnonzero(is_in)
    values = np.ones(len(columns), dtype=np.float32)
    return scipy.sparse.csr_matrix((values, (rows[columns], columns)), shape=(num_rows, len(rows)))


def _read_profiles(directory: Path, shard: int, number: int, users: np.ndarray) -> list[dict[str, str]]:
    table = pq.ParquetFile(directory / users_file(shard)).read_row_group(number, ["labels"], use_threads=False)
    return [dict(pairs) for pairs in table["labels"].take(pa.array(users)).to_pylist()]


def _last_events(group: RowGroup) -> np.ndarray:
    """Position of each user's last event: the latest; of equal ones, in the last service. Unknown times come first."""
    counts_H = np.diff(group.history_offsets)
    users_E = np.repeat(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)), counts_H)
    times_E = group.times.fill_null(NO_TIME).to_numpy()
    order = np.lexsort([np.arange(len(users_E)), np.repeat(group.services, counts_H), times_E, users_E])
    return order[group.history_offsets[group.user_offsets[1:]] - 1]


def _labels(profiles: list[dict[str, str]], is_train: np.ndarray) -> dict[str, ProbeLabel]:
    """By name, labels with two classes, a held-out user, and enough training users."""
    labels = dict[str, ProbeLabel]()
    for name in sorted({name for profile in profiles for name in profile}):
        values = [profile.get(name) for profile in profiles]
        known = [value for value, train in zip(values, is_train, strict=True) if train and value is not None]
        classes = tuple(sorted(set(known)))
        code = {value: number for number, value in enumerate(classes)}
        codes = np.array([UNKNOWN if value is None else code.get(value, UNKNOWN) for value in values])
        is_enough = len(known) >= max(MIN_LABELLED, MIN_PER_CLASS * len(classes))
        if len(classes) >= 2 and is_enough and (codes[~is_train] != UNKNOWN).any():
            labels[name] = ProbeLabel(classes, codes)
    return labels
