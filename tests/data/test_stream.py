import itertools
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from ray.data import DataContext
from ray.train import DataConfig

from tests.support.tokenized import User, View, list_samples, token_texts, write_shards
from userrep.data.augment import AugmentConfig
from userrep.data.batch import ARRAYS, UserBatch, from_table
from userrep.data.plan import Plan
from userrep.data.split import SPLITS, id_keys
from userrep.data.stream import execution_options, local_batches, make_plan, stream_dataset, window_batches
from userrep.data.views import ViewConfig, manifest_row_groups

VIEWS = ViewConfig(kinds=("service", "time", "mixed"), max_events=5)
PLAIN = AugmentConfig()
RANDOM = AugmentConfig(cut="random", min_keep=0.3, max_events=4, token_drop=0.4)
BATCH = 4


class Table(NamedTuple):
    directory: Path
    shards: list[dict[str, Any]]
    users: list[User]

    def plan(self, num_steps: int, batch: int = BATCH) -> Plan:
        return make_plan(self.shards, VIEWS, batch, seed=3, num_steps=num_steps)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Twelve row groups in three shards; several main windows of a batch of 4, and tail windows."""
    rng = np.random.default_rng(0)
    users: list[User] = []
    shards: list[list[list[User]]] = [[], [], [], []]
    for number in range(12):
        group = []
        for _ in range(rng.integers(1, 14)):
            services = np.flatnonzero(rng.random(3) < 0.7)
            services = services if len(services) else np.array([1])
            histories: dict[int, View] = {
                int(service): [(f"item {rng.integers(40)}", int(t)) for t in range(rng.integers(1, 8))]
                for service in services
            }
            group.append(User(f"user {len(users) + len(group)}", SPLITS[rng.choice(3, p=[0.8, 0.1, 0.1])], histories))
        users += group
        shards[number % 3].append(group)  # the fourth shard has no user
    users = [user for shard in shards for group in shard for user in group]
    directory = tmp_path_factory.mktemp("shards")
    return Table(directory, write_shards(directory, shards), users)


def histories_of(batch: UserBatch) -> list[list[list[int]]]:
    bounds, items = batch.token_offsets, batch.history_offsets
    dictionary = [batch.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return [[dictionary[item] for item in batch.history_items[a:b]] for a, b in itertools.pairwise(items)]


def seen_by(batch: UserBatch) -> list[tuple[int, list[list[int]], list[list[int]]]]:
    """(key, anchor's tokens, positive's tokens) of every user."""
    histories, size = histories_of(batch), len(batch.user_keys)
    return list(zip(batch.user_keys.tolist(), histories[:size], histories[size:], strict=True))


def steps(
    table: Table, plan: Plan, augment: AugmentConfig, world_size: int, start_step: int = 0
) -> list[list[UserBatch]]:
    """Batches of all ranks, step by step."""
    row_groups = [(shard, number) for shard, number, _ in manifest_row_groups(table.shards)]
    found: list[UserBatch] = []
    for epoch, index in plan.windows(start_step):
        window = plan.window(epoch, index)
        parts = window_batches(table.directory, row_groups, VIEWS, augment, plan, window, world_size, start_step)
        found += map(from_table, parts)
    return [found[n : n + world_size] for n in range(0, len(found), world_size)]


def assert_equal(one: UserBatch, other: UserBatch) -> None:
    assert one.step == other.step
    for name in ARRAYS:
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name


def test_an_epoch_holds_the_samples_of_the_reference(table: Table):
    expected = Counter(
        (repr(token_texts(anchor)), repr(token_texts(positive)))
        for _, anchor, positive in list_samples(table.users, VIEWS.kinds, "train")
    )
    plan = table.plan(num_steps=2 * (sum(expected.values()) // BATCH))
    assert plan.num_samples == sum(expected.values())
    assert len(plan.epoch_windows(0)) >= 4, "too small a table to have main and tail windows"
    batches = list(local_batches(table.directory, table.shards, VIEWS, PLAIN, plan))
    assert [batch.step for batch in batches] == list(range(plan.num_steps))
    for epoch in range(2):
        mine = batches[epoch * plan.steps_per_epoch :][: plan.steps_per_epoch]
        seen = Counter((repr(a), repr(b)) for batch in mine for _, a, b in seen_by(batch))
        assert seen <= expected
        assert (expected - seen).total() == plan.num_unused < BATCH


@pytest.mark.parametrize("augment", [PLAIN, RANDOM])
def test_the_global_batches_do_not_depend_on_the_number_of_workers(table: Table, augment: AugmentConfig):
    plan = table.plan(num_steps=90)
    alone = steps(table, plan, augment, 1)
    assert [batch.step for (batch,) in alone] == list(range(90))
    for world_size in (2, 4):
        parted = steps(table, plan, augment, world_size)
        assert len(parted) == 90
        for (whole,), ranks in zip(alone, parted, strict=True):
            assert {batch.step for batch in ranks} == {whole.step}
            assert {len(batch.user_keys) for batch in ranks} == {BATCH // world_size}
            assert [seen for batch in ranks for seen in seen_by(batch)] == seen_by(whole)
            for name in ("user_keys", "service_pairs", "positive_items"):
                assert (
                    np.concatenate([getattr(batch, name) for batch in ranks]).tolist() == getattr(whole, name).tolist()
                )
    pairs = {int(pair) for (whole,) in alone for pair in whole.service_pairs}
    assert pairs == {0} | {1 + 256 * one + other for one, other in itertools.combinations(range(3), 2)}


def test_an_item_has_one_key_in_all_windows(table: Table):
    plan = table.plan(num_steps=60)
    assert len(plan.windows(0)) > 1
    batches = list(local_batches(table.directory, table.shards, VIEWS, PLAIN, plan))
    found = {int(key) % 2**64 for batch in batches for key in batch.positive_items}
    names = [f"item {number}" for number in range(40)]
    assert found <= {int(key) for key in id_keys(pa.array(names))}
    assert len(found) > 30


def test_random_views_differ_between_epochs_and_seeds(table: Table):
    plan = table.plan(num_steps=0)
    plan = table.plan(num_steps=2 * plan.steps_per_epoch)
    batches = list(local_batches(table.directory, table.shards, VIEWS, RANDOM, plan))
    first, second = (
        Counter(
            repr(seen)
            for batch in batches[n * plan.steps_per_epoch :][: plan.steps_per_epoch]
            for seen in seen_by(batch)
        )
        for n in range(2)
    )
    assert (first & second).total() < 0.7 * first.total()


@pytest.mark.parametrize("augment", [PLAIN, RANDOM])
def test_a_stream_that_starts_later_goes_on_as_the_first_would_have(table: Table, augment: AugmentConfig):
    plan = table.plan(num_steps=75)
    straight = list(local_batches(table.directory, table.shards, VIEWS, augment, plan))
    for start in range(0, 76, 5):
        rest = list(local_batches(table.directory, table.shards, VIEWS, augment, plan, start))
        assert len(rest) == 75 - start
        for one, other in zip(rest, straight[start:], strict=True):
            assert_equal(one, other)


@pytest.fixture
def data_context() -> Iterator[None]:
    """Undoes what a stream sets for all of Ray Data in this process."""
    with DataContext.current(DataContext.get_current().copy()):
        yield


def deal(table: Table, plan: Plan, world_size: int, start_step: int) -> list[list[UserBatch]]:
    """What every rank receives, through the trainer's own way of splitting a dataset (training/loop.py)."""
    dataset = stream_dataset(table.directory, table.shards, VIEWS, RANDOM, plan, world_size, start_step)
    config = DataConfig(datasets_to_split=["train"], execution_options=execution_options())
    iterators = config.configure({"train": dataset}, world_size, worker_handles=None, worker_node_ids=None)
    received: list[list[UserBatch]] = [[] for _ in range(world_size)]
    failures: list[BaseException] = []

    def receive(rank: int) -> None:
        try:
            batches = iterators[rank]["train"].iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4)
            received[rank] += map(from_table, batches)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=receive, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    return received


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "data_context")
@pytest.mark.parametrize(("world_size", "start_step"), [(1, 0), (2, 0), (2, 23)])
def test_ray_deals_every_rank_its_batch_of_every_step(table: Table, world_size: int, start_step: int):
    plan = table.plan(num_steps=60)
    windows = [plan.window(*place) for place in plan.windows(start_step)]
    assert windows[0].first_step < start_step or not start_step, "meant to start within a window"
    expected = steps(table, plan, RANDOM, world_size, start_step)
    received = deal(table, plan, world_size, start_step)
    for rank in range(world_size):
        assert [batch.step for batch in received[rank]] == list(range(start_step, 60))
        for one, ranks in zip(received[rank], expected, strict=True):
            assert_equal(one, ranks[rank])
    if world_size == 1:
        local = local_batches(table.directory, table.shards, VIEWS, RANDOM, plan, start_step)
        for one, other in zip(received[0], local, strict=True):
            assert_equal(one, other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "data_context")
def test_a_finished_run_has_an_empty_stream(table: Table):
    assert deal(table, table.plan(num_steps=10), world_size=2, start_step=10) == [[], []]
