"""Two views of a user: which samples a row group offers, and what a model sees of each."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from userrep.config import Config
from userrep.data.assemble import items_file, users_file
from userrep.data.batch import HistoryBatch, TokenFilter, UserBatch, compact, gather_ranges
from userrep.data.split import SPLITS, id_keys

ViewKind = Literal["service", "time", "mixed", "next_item"]
PAIR_BASE = 256  # above every service index, which is an int8
# Histories without the values of the events, in the names that Parquet gives to the levels of a list.
USER_COLUMNS = ["user_id", "split", *(f"histories.list.element.{name}" for name in ("service", "items", "times"))]


class ViewConfig(Config):
    """What makes a pair of views.

    `service`: histories of a user in two services; every pair that the user has is a sample.
    `time`: the earlier and the later half of a history; every history of at least two events is a sample.
    `mixed`: two random halves of a user's events in all services; every user with at least two events is a sample.
    It cannot be measured on (there is no one right cut), but teaches which items go together.
    `next_item`: the events before a target against the target; every history of at least two events is a sample. It is
    measured on the last event; training draws the target (`AugmentConfig.targets`).
    """

    kinds: tuple[ViewKind, ...] = Field(default=("service",), min_length=1)  # trained on all; measured on the first
    max_events: int = Field(default=64, ge=1)  # the most recent so many of each view


@dataclass(frozen=True)
class RowGroup:
    """One or more row groups in memory, as flat arrays over one item dictionary."""

    user_ids: pa.Array  # (N,)
    keys: np.ndarray  # uint64 (N,)
    splits: np.ndarray  # int8 (N,)
    user_offsets: np.ndarray  # histories of each user, (N + 1,)
    services: np.ndarray  # service of each history, int8 (H,)
    history_offsets: np.ndarray  # events of each history, (H + 1,)
    items: np.ndarray  # item reference of each event, (E,)
    times: pa.Array  # of each event, int64 with nulls (E,)
    item_ids: pa.Array  # (U,)
    tokens: np.ndarray  # (T,)
    token_offsets: np.ndarray  # (U + 1,)

    @cached_property
    def item_keys(self) -> np.ndarray:
        """64-bit keys of the items, uint64 (U,); hashed once for all batches of a window."""
        return id_keys(self.item_ids)


@dataclass(frozen=True)
class Samples:
    """Pairs of views as event ranges of a RowGroup. Arrays of (M,)."""

    users: np.ndarray
    anchor_starts: np.ndarray
    anchor_lengths: np.ndarray
    positive_starts: np.ndarray
    positive_lengths: np.ndarray
    is_cut: np.ndarray  # both views are parts of one history
    is_next: np.ndarray  # the positive is the event after the anchor
    service_pairs: np.ndarray  # int64; see UserBatch

    def take(self, order: np.ndarray) -> "Samples":
        """The samples at the given positions."""
        return Samples(**{name: values[order] for name, values in vars(self).items()})


def read_row_group(directory: Path, shard: int, group: int) -> RowGroup:
    """Reads one row group of a tokenized shard with its item dictionary."""
    # One thread: a reader beside a training step has one core, and pyarrow's threads cost CPU time of their own.
    users = pq.ParquetFile(directory / users_file(shard)).read_row_group(group, USER_COLUMNS, use_threads=False)
    items = pq.ParquetFile(directory / items_file(shard)).read_row_group(group, use_threads=False)
    user_ids = users["user_id"].combine_chunks()
    histories = users["histories"].combine_chunks()
    services, references, times = (histories.values.field(name) for name in ("service", "items", "times"))
    tokens = items["tokens"].combine_chunks()
    return RowGroup(
        user_ids=user_ids,
        keys=id_keys(user_ids),
        splits=users["split"].to_numpy(),
        user_offsets=histories.offsets.to_numpy(),
        services=services.to_numpy(),
        history_offsets=references.offsets.to_numpy(),
        items=references.values.to_numpy(),
        times=times.values,
        item_ids=items["item_id"].combine_chunks(),
        tokens=tokens.values.to_numpy(),
        token_offsets=tokens.offsets.to_numpy(),
    )


def merge_row_groups(groups: list[RowGroup]) -> tuple[RowGroup, np.ndarray]:
    """Concatenates row groups over one item dictionary in which every item stands once.

    Returns:
        The merged row group, and the first user of each part, (len(groups),).
    """
    encoded = pa.concat_arrays([group.item_ids for group in groups]).dictionary_encode()
    merged_item = encoded.indices.to_numpy()
    first_entry = np.empty(len(encoded.dictionary), dtype=np.int64)
    first_entry[merged_item[::-1]] = np.arange(len(merged_item))[::-1]  # of equal indices, the last assignment holds
    token_bases = np.cumsum([0] + [len(group.tokens) for group in groups])
    starts = np.concatenate([g.token_offsets[:-1] + base for g, base in zip(groups, token_bases, strict=False)])[
        first_entry
    ]
    lengths = np.concatenate([np.diff(group.token_offsets) for group in groups])[first_entry]
    positions, token_offsets = gather_ranges(starts, lengths)
    item_bases = np.cumsum([0] + [len(group.item_ids) for group in groups])
    user_bases = np.cumsum([0] + [len(group.keys) for group in groups])
    merged = RowGroup(
        user_ids=pa.concat_arrays([group.user_ids for group in groups]),
        keys=np.concatenate([group.keys for group in groups]),
        splits=np.concatenate([group.splits for group in groups]),
        user_offsets=_concat_offsets([group.user_offsets for group in groups]),
        services=np.concatenate([group.services for group in groups]),
        history_offsets=_concat_offsets([group.history_offsets for group in groups]),
        items=np.concatenate([merged_item[g.items + base] for g, base in zip(groups, item_bases, strict=False)]),
        times=pa.concat_arrays([group.times for group in groups]),
        item_ids=encoded.dictionary,
        tokens=np.concatenate([group.tokens for group in groups])[positions],
        token_offsets=token_offsets,
    )
    return merged, user_bases[:-1]


def list_samples(group: RowGroup, kinds: tuple[ViewKind, ...], split: str) -> Samples:
    """All samples that users of a split offer, in user order. Their number is what the manifest counts."""
    wanted = group.splits == SPLITS.index(split)
    lists = {
        "service": _service_samples,
        "time": _time_samples,
        "mixed": _mixed_samples,
        "next_item": _next_item_samples,
    }
    parts = [lists[kind](group, wanted) for kind in kinds]
    joined = Samples(
        *(np.concatenate(columns) for columns in zip(*(vars(part).values() for part in parts), strict=True))
    )
    return joined.take(np.argsort(joined.users, kind="stable"))


def _time_samples(group: RowGroup, wanted: np.ndarray) -> Samples:
    users, starts, lengths = _long_histories(group, wanted)
    return _cut(users, starts, lengths, lengths // 2)


def _next_item_samples(group: RowGroup, wanted: np.ndarray) -> Samples:
    users, starts, lengths = _long_histories(group, wanted)
    return _cut(users, starts, lengths, lengths - 1, is_next=True)


def _long_histories(group: RowGroup, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """User, first event and length of every history of at least two events."""
    users = np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets))
    lengths = np.diff(group.history_offsets)
    histories = np.flatnonzero((lengths >= 2) & wanted[users])
    return users[histories], group.history_offsets[histories], lengths[histories]


def _mixed_samples(group: RowGroup, wanted: np.ndarray) -> Samples:
    starts = group.history_offsets[group.user_offsets]
    users = np.flatnonzero((np.diff(starts) >= 2) & wanted)
    lengths = np.diff(starts)[users]
    return _cut(users, starts[users], lengths, lengths // 2)


def _cut(
    users: np.ndarray, starts: np.ndarray, lengths: np.ndarray, anchor_lengths: np.ndarray, is_next: bool = False
) -> Samples:
    """The first so many events of event ranges against the rest."""
    nexts, no_pair = np.full(len(users), is_next), np.zeros(len(users), dtype=np.int64)
    return Samples(
        users, starts, anchor_lengths, starts + anchor_lengths, lengths - anchor_lengths, ~nexts, nexts, no_pair
    )


def _service_samples(group: RowGroup, wanted: np.ndarray) -> Samples:
    num_services = np.diff(group.user_offsets)
    users, anchors, positives = (
        [np.zeros(0, dtype=np.int64)],
        [np.zeros(0, dtype=np.int64)],
        [np.zeros(0, dtype=np.int64)],
    )
    for count in np.unique(num_services[wanted & (num_services > 1)]):
        members = np.flatnonzero(wanted & (num_services == count))
        left, right = np.triu_indices(count, k=1)
        users.append(np.repeat(members, len(left)))
        anchors.append((group.user_offsets[members, None] + left).ravel())
        positives.append((group.user_offsets[members, None] + right).ravel())
    anchor, positive = np.concatenate(anchors), np.concatenate(positives)
    starts, lengths = group.history_offsets[:-1], np.diff(group.history_offsets)
    services = group.services.astype(np.int64)
    return Samples(
        users=np.concatenate(users),
        anchor_starts=starts[anchor],
        anchor_lengths=lengths[anchor],
        positive_starts=starts[positive],
        positive_lengths=lengths[positive],
        is_cut=np.zeros(len(anchor), dtype=bool),
        is_next=np.zeros(len(anchor), dtype=bool),
        service_pairs=1 + PAIR_BASE * services[anchor] + services[positive],
    )


@dataclass(frozen=True)
class DrawnEvents:
    """Which events of a batch's views are seen. `positions` (E,) into the row group's events, `offsets` (2M + 1,)."""

    positions: np.ndarray
    offsets: np.ndarray

    def of_users(self, start: int, stop: int) -> "DrawnEvents":
        """The part that belongs to samples [start, stop): their anchors, then their positives."""
        num_samples = (len(self.offsets) - 1) // 2
        views = np.concatenate([np.arange(start, stop), np.arange(num_samples + start, num_samples + stop)])
        kept, offsets = gather_ranges(self.offsets[views], np.diff(self.offsets)[views])
        return DrawnEvents(self.positions[kept], offsets)


def latest_events(samples: Samples, max_events: int) -> DrawnEvents:
    """The most recent events of every view."""
    starts = np.concatenate([samples.anchor_starts, samples.positive_starts])
    lengths = np.concatenate([samples.anchor_lengths, samples.positive_lengths])
    kept = np.minimum(lengths, max_events)
    return DrawnEvents(*gather_ranges(starts + lengths - kept, kept))


def build_batch(
    group: RowGroup, samples: Samples, events: DrawnEvents, step: int = 0, token_filter: TokenFilter | None = None
) -> UserBatch:
    """Turns samples into a batch over the unique items that are seen of them.

    Args:
        group: the events and items that the samples refer to.
        samples: one per user of the batch.
        events: what is seen of their views.
        step: optimizer step that the batch is for.
        token_filter: what to leave out of the item dictionary; default: nothing.
    """
    references, tokens, token_offsets, items = compact(
        group.items[events.positions], group.tokens, group.token_offsets, token_filter
    )
    return UserBatch(
        tokens=tokens,
        token_offsets=token_offsets,
        history_items=references,
        history_offsets=events.offsets.astype(np.int32),
        user_keys=group.keys[samples.users].view(np.int64),
        service_pairs=samples.service_pairs,
        item_keys=group.item_keys[items].view(np.int64),
        step=step,
    )


def all_histories(group: RowGroup, max_events: int) -> HistoryBatch:
    """Every history of a row group, for inference."""
    lengths = np.diff(group.history_offsets)
    kept = np.minimum(lengths, max_events)
    positions, offsets = gather_ranges(group.history_offsets[1:] - kept, kept)
    references, tokens, token_offsets, items = compact(group.items[positions], group.tokens, group.token_offsets)
    keys = group.item_keys[items].view(np.int64)
    return HistoryBatch(tokens, token_offsets, references, offsets.astype(np.int32), keys)


def _concat_offsets(parts: list[np.ndarray]) -> np.ndarray:
    """Offsets of concatenated ragged arrays."""
    lengths = np.concatenate([np.diff(part) for part in parts])
    return np.concatenate([[0], np.cumsum(lengths)])


def manifest_row_groups(shards: list[dict[str, Any]]) -> list[tuple[int, int, dict[str, dict[str, int]]]]:
    """(shard, row group, sample counts) of every row group of a shard table, in manifest order."""
    return [
        (shard["shard"], number, group["samples"])
        for shard in shards
        for number, group in enumerate(shard["row_groups"])
    ]
