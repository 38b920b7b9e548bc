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

from tests.support.batches import seen_by, steps
from tests.support.tokenized import User, View, list_samples, token_texts, write_shards
from userrep.data.augment import AugmentConfig
from userrep.data.batch import ARRAYS, UserBatch, from_table
from userrep.data.split import SPLITS, id_keys
from userrep.data.stream import ShardSet, TrainingStream, execution_options, open_stream
from userrep.data.views import RowGroup, ViewConfig, read_row_group

VIEWS = ViewConfig(kinds=("service", "time", "mixed"), max_events=5)
PLAIN = AugmentConfig()
RANDOM = AugmentConfig(cut="random", min_keep=0.3, max_events=4, token_drop=0.4)
BATCH = 4


class Table(NamedTuple):
    directory: Path
    shards: list[dict[str, Any]]
    users: list[User]

    def stream(self, num_steps: int, augment: AugmentConfig = PLAIN, batch: int = BATCH) -> TrainingStream:
        return open_stream([ShardSet(self.directory, self.shards)], VIEWS, augment, batch, seed=3, num_steps=num_steps)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """Twelve row groups in three shards; several windows of batches of 4 to an epoch."""
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


def assert_equal(one: UserBatch, other: UserBatch) -> None:
    assert one.step == other.step
    for name in ARRAYS:
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name


def test_an_epoch_holds_the_samples_of_the_reference(table: Table):
    expected = Counter(
        (repr(token_texts(anchor)), repr(token_texts(positive)))
        for _, anchor, positive in list_samples(table.users, VIEWS.kinds, "train")
    )
    size = expected.total()
    stream = table.stream(num_steps=3 * size // BATCH)
    assert stream.plan.num_samples == (size,)
    assert size % BATCH, "meant to have epochs that end within a batch"
    assert len(stream.plan.windows()) > 3 * 2
    batches = list(stream.batches())
    assert [batch.step for batch in batches] == list(range(stream.plan.num_steps))
    run = [(repr(a), repr(b)) for batch in batches for _, a, b in seen_by(batch)]
    assert Counter(run[:size]) == Counter(run[size : 2 * size]) == expected
    last = Counter(run[2 * size :])
    assert last <= expected
    assert (expected - last).total() == size - stream.plan.coverage(stream.plan.num_steps)[0].begun < BATCH


@pytest.mark.parametrize("augment", [PLAIN, RANDOM])
@pytest.mark.parametrize("batch", [BATCH, 7])
def test_the_global_batches_do_not_depend_on_the_number_of_workers(table: Table, augment: AugmentConfig, batch: int):
    stream = table.stream(60, augment, batch)
    alone = steps(stream, 1)
    assert [batch.step for (batch,) in alone] == list(range(60))
    for world_size in (2, 3, 4, 5)[: batch - 1]:
        parted = steps(stream, world_size)
        sizes = [(rank + 1) * batch // world_size - rank * batch // world_size for rank in range(world_size)]
        assert sum(sizes) == batch
        assert max(sizes) - min(sizes) <= 1
        assert len(parted) == 60
        for (whole,), ranks in zip(alone, parted, strict=True):
            assert {batch.step for batch in ranks} == {whole.step}
            assert [len(batch.user_keys) for batch in ranks] == sizes
            assert [seen for batch in ranks for seen in seen_by(batch)] == seen_by(whole)
            for name in ("user_keys", "service_pairs", "positive_item_keys"):
                assert (
                    np.concatenate([getattr(batch, name) for batch in ranks]).tolist() == getattr(whole, name).tolist()
                )
    pairs = {int(pair) for (whole,) in alone for pair in whole.service_pairs}
    assert pairs == {0} | {1 + 256 * one + other for one, other in itertools.combinations(range(3), 2)}


@pytest.mark.parametrize("world_size", [0, BATCH + 1])
def test_a_worker_without_a_sample_is_refused(table: Table, world_size: int):
    with pytest.raises(ValueError, match=f"{world_size} workers cannot share a global batch of {BATCH} users"):
        table.stream(10).dataset(world_size)


def test_an_item_has_one_key_in_all_windows(table: Table):
    stream = table.stream(num_steps=60)
    assert len(stream.plan.windows()) > 1
    found = {int(key) % 2**64 for batch in stream.batches() for key in batch.positive_item_keys}
    names = [f"item {number}" for number in range(40)]
    assert found <= {int(key) for key in id_keys(pa.array(names))}
    assert len(found) > 30


def test_random_views_differ_between_epochs(table: Table):
    (size,) = table.stream(0).plan.num_samples
    run = [seen for batch in table.stream(2 * size, RANDOM, batch=1).batches() for seen in seen_by(batch)]
    first, second = (Counter(map(repr, part)) for part in (run[:size], run[size:]))
    assert (first & second).total() < 0.7 * size


@pytest.mark.parametrize(
    "augment", [AugmentConfig(cut="random"), AugmentConfig(min_keep=0.2), AugmentConfig(token_drop=0.5)]
)
def test_every_step_of_a_window_is_drawn_anew(tmp_path: Path, augment: AugmentConfig):
    lone = User("a user", "train", {0: [(f"item {number}", number) for number in range(10)]})
    sets = [ShardSet(tmp_path, write_shards(tmp_path, [[[lone]]]))]
    stream = open_stream(sets, ViewConfig(kinds=("time",)), augment, 1, seed=0, num_steps=16)
    assert len(stream.plan.windows()) == 1
    # Each step has more than a hundred ways to see this user, so few of 16 are alike.
    assert len({repr(seen_by(batch)) for batch in stream.batches()}) > 8


@pytest.mark.parametrize("augment", [PLAIN, RANDOM])
def test_a_stream_that_starts_later_goes_on_as_the_first_would_have(table: Table, augment: AugmentConfig):
    stream = table.stream(75, augment)
    straight = list(stream.batches())
    for start in range(0, 76, 5):
        rest = list(stream.batches(start))
        assert len(rest) == 75 - start
        for one, other in zip(rest, straight[start:], strict=True):
            assert_equal(one, other)


def test_a_stream_that_starts_late_reads_what_it_needs(table: Table, monkeypatch: pytest.MonkeyPatch):
    reads: list[tuple[int, int]] = []

    def read(directory: Path, shard: int, number: int) -> RowGroup:
        reads.append((shard, number))
        return read_row_group(directory, shard, number)

    monkeypatch.setattr("userrep.data.stream.read_row_group", read)
    stream = table.stream(10_000)
    last = stream.plan.windows()[-1]
    (batch,) = stream.batches(9_999)
    assert batch.step == 9_999
    assert len(reads) == len(set(reads)) == len(np.unique(stream.plan.samples(last)[0]))


@pytest.fixture
def data_context() -> Iterator[None]:
    """Undoes what a stream sets for all of Ray Data in this process."""
    with DataContext.current(DataContext.get_current().copy()):
        yield


def deal(stream: TrainingStream, world_size: int, start_step: int) -> list[list[UserBatch]]:
    """What every rank receives, through the trainer's own way of splitting a dataset (training/loop.py)."""
    dataset = stream.dataset(world_size, start_step)
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
@pytest.mark.parametrize(("world_size", "start_step"), [(1, 0), (2, 23), (3, 0)])
def test_ray_deals_every_rank_its_batch_of_every_step(table: Table, world_size: int, start_step: int):
    stream = table.stream(60, RANDOM)
    assert start_step % stream.plan.window_steps or not start_step, "meant to start within a window"
    expected = steps(stream, world_size, start_step)
    received = deal(stream, world_size, start_step)
    for rank in range(world_size):
        assert [batch.step for batch in received[rank]] == list(range(start_step, 60))
        for one, ranks in zip(received[rank], expected, strict=True):
            assert_equal(one, ranks[rank])
    if world_size == 1:
        for one, other in zip(received[0], stream.batches(start_step), strict=True):
            assert_equal(one, other)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "data_context")
def test_a_finished_run_has_an_empty_stream(table: Table):
    assert deal(table.stream(10), world_size=2, start_step=10) == [[], []]
