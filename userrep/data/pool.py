"""Held-out users on which every method is measured: the same users, the same candidates."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from userrep.data.batch import UserBatch
from userrep.data.views import (
    RowGroup,
    Samples,
    ViewConfig,
    build_batch,
    latest_events,
    list_samples,
    manifest_row_groups,
    merge_row_groups,
    read_row_group,
)


@dataclass(frozen=True)
class Pool:
    """One sample of each of P held-out users."""

    group: RowGroup
    samples: Samples
    max_events: int

    def __len__(self) -> int:
        """Number of users P."""
        return len(self.samples.users)

    def user_ids(self) -> list[str]:
        """Ids of the users, (P,)."""
        return self.group.user_ids.take(self.samples.users).to_pylist()

    def batch(self, start: int = 0, stop: int | None = None) -> UserBatch:
        """Users [start, stop) as a batch."""
        part = self.samples.take(np.arange(len(self))[start:stop])
        return build_batch(self.group, part, latest_events(part, self.max_events))

    def view_events(self) -> tuple[list[tuple[list[str], list[int]]], list[tuple[list[str], list[int]]]]:
        """Item ids and times of every user's anchor and of every user's positive."""
        events = latest_events(self.samples, self.max_events)
        ids = np.asarray(self.group.item_ids.to_pylist(), dtype=object)[self.group.items[events.positions]]
        times = np.asarray(self.group.times.take(pa.array(events.positions)).to_pylist(), dtype=object)
        borders = events.offsets[1:-1]
        views = [(list(i), list(t)) for i, t in zip(np.split(ids, borders), np.split(times, borders), strict=True)]
        return views[: len(self)], views[len(self) :]


def load_pool(directory: Path, shards: list[dict[str, Any]], views: ViewConfig, split: str, size: int) -> Pool:
    """The first `size` users of a split who have a pair of views, one sample each (fewer when the split has fewer).

    Shards hold users by hash, so the first ones are a random choice, and the same one for every method.

    Raises:
        ValueError: the split has fewer than two such users.
    """
    kind = views.kinds[0]
    groups, num_users = [], 0
    for shard, number, samples in manifest_row_groups(shards):
        if num_users >= size:
            break
        if samples[split][kind]:
            groups.append(read_row_group(directory, shard, number))
            num_users += len(np.unique(list_samples(groups[-1], (kind,), split).users))
    if num_users < 2:
        raise ValueError(
            f"the {split} split has {num_users} users with {kind} views, retrieval needs at least 2: "
            f"hold out more users (ingest.split.{split}) or use other views"
        )
    merged, _ = merge_row_groups(groups)
    candidates = list_samples(merged, (kind,), split)
    _, first = np.unique(candidates.users, return_index=True)
    return Pool(merged, candidates.take(first[:size]), views.max_events)
