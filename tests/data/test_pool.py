from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.tokenized import Group, User, View, list_samples, tables, token_texts, write_shards
from userrep.data.batch import UserBatch
from userrep.data.pool import Pool, load_pool
from userrep.data.split import id_keys
from userrep.data.views import ViewConfig, ViewKind

KINDS: list[tuple[ViewKind, ...]] = [("service",), ("time",), ("time", "service")]


def first_samples(shards: list[list[Group]], kind: ViewKind, split: str, size: int) -> list[tuple[str, View, View]]:
    """The first sample of each of the first users who have one."""
    found: dict[str, tuple[str, View, View]] = {}
    for user in (user for shard in shards for group in shard for user in group):
        for sample in list_samples([user], (kind,), split)[:1]:
            found[user.user_id] = sample
    return list(found.values())[:size]


def views_of(batch: UserBatch) -> list[list[list[int]]]:
    items = np.split(batch.tokens, batch.token_offsets[1:-1])
    histories = np.split(batch.history_items, batch.history_offsets[1:-1])
    return [[items[item].tolist() for item in history] for history in histories]


@settings(max_examples=30, deadline=None)
@given(
    tables(),
    st.sampled_from(KINDS),
    st.sampled_from(["train", "validation", "test"]),
    st.integers(2, 9),
    st.integers(1, 7),
)
def test_the_pool_is_that_of_the_reference(
    shards: list[list[Group]], kinds: tuple[ViewKind, ...], split: str, size: int, max_events: int
):
    expected = first_samples(shards, kinds[0], split, size)
    assume(len(expected) >= 2)
    with TemporaryDirectory() as folder:
        pool = load_pool(Path(folder), write_shards(Path(folder), shards), _views(kinds, max_events), split, size)
    assert len(pool) == len(expected)
    assert pool.user_ids() == [user for user, _, _ in expected]
    anchors = [anchor[-max_events:] for _, anchor, _ in expected]
    positives = [positive[-max_events:] for _, _, positive in expected]
    as_lists = [([item for item, _ in view], [time for _, time in view]) for view in [*anchors, *positives]]
    seen = pool.view_events()
    assert [*seen[0], *seen[1]] == as_lists
    for start, stop in ((0, None), (1, 2), (1, None)):
        batch = pool.batch(start, stop)
        chosen = slice(start, stop)
        assert views_of(batch) == [token_texts(view) for view in [*anchors[chosen], *positives[chosen]]]
        assert len(set(batch.user_keys.tolist())) == len(anchors[chosen])
        last_items = pa.array([view[-1][0] for view in positives[chosen]], pa.string())
        assert batch.positive_item_keys.tolist() == id_keys(last_items).view(np.int64).tolist()
        assert (batch.service_pairs > 0).tolist() == [kinds[0] == "service"] * len(last_items)


def _views(kinds: tuple[ViewKind, ...], max_events: int) -> ViewConfig:
    return ViewConfig(kinds=kinds, max_events=max_events)


def table(num_users: int) -> list[list[Group]]:
    """Users with two services each, two per row group."""
    users = [User(f"u{n}", "test", {0: [("a", n)], 1: [("b", n)]}) for n in range(num_users)]
    return [[users[start : start + 2] for start in range(0, num_users, 2)]]


@pytest.mark.parametrize("num_users", [0, 1])
def test_a_split_with_fewer_than_two_users_is_refused(tmp_path: Path, num_users: int):
    shards: list[dict[str, Any]] = write_shards(tmp_path, table(num_users))
    with pytest.raises(ValueError, match=f"the test split has {num_users} users with service views"):
        load_pool(tmp_path, shards, ViewConfig(), "test", 10)


def test_a_larger_pool_begins_with_the_smaller_one(tmp_path: Path):
    shards = write_shards(tmp_path, table(9))
    pools: list[Pool] = [load_pool(tmp_path, shards, ViewConfig(), "test", size) for size in (2, 5, 100)]
    assert [len(pool) for pool in pools] == [2, 5, 9]
    assert pools[2].user_ids()[:5] == pools[1].user_ids()
    assert pools[1].user_ids()[:2] == pools[0].user_ids()
