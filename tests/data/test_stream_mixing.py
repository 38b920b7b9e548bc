"""Streams over several tables, and over random ones: exactly once, whatever the sources, workers and restarts."""

import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import tokenized
from tests.support.batches import seen_by, steps
from tests.support.tokenized import Group, tables, token_texts, write_shards
from userrep.data.augment import AugmentConfig
from userrep.data.batch import UserBatch
from userrep.data.split import id_keys
from userrep.data.stream import ShardSet, TrainingStream, open_stream, read_shard_sets
from userrep.data.tokenizer import TokenizerMismatchError
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, write_manifest

VIEWS = ViewConfig(kinds=("service", "time"), max_events=6)  # histories are no longer: whole views are seen
RANDOM = AugmentConfig(cut="random", min_keep=0.5, max_events=4, token_drop=0.3)
TOKENS_PER_SOURCE = 10_000  # each source has token ids of its own, so that a batch tells where its items are from
SOURCE_PAIRS = 256 * 256  # values of service_pairs for each source
Sample = tuple[int, str, str]  # user key, tokens of the anchor, tokens of the positive


class Mixture(NamedTuple):
    """Tables, their weights, and all samples of each."""

    sets: list[ShardSet]
    expected: list[Counter[Sample]]

    def stream(self, batch: int, seed: int, num_steps: int, augment: AugmentConfig) -> TrainingStream:
        return open_stream(self.sets, VIEWS, augment, batch, seed, num_steps)


def write_mixture(directory: Path, contents: list[list[list[Group]]], weights: list[float]) -> Mixture:
    """Writes a table for each source. Users and items have the same ids in all of them, items have other texts."""
    plain = tokenized.item_tokens
    sets, expected = [], []
    for source, (shards, weight) in enumerate(zip(contents, weights, strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            base = TOKENS_PER_SOURCE * source
            patch.setattr(tokenized, "item_tokens", lambda name, base=base: [base + token for token in plain(name)])
            folder = directory / str(source)
            sets.append(ShardSet(folder, write_shards(folder, shards), weight))
            users = [user for shard in shards for group in shard for user in group]
            expected.append(
                Counter(
                    (int(id_keys(pa.array([name]))[0].astype(np.int64)), repr(one), repr(other))
                    for name, anchor, positive in tokenized.list_samples(users, VIEWS.kinds, "train")
                    for one, other in [(token_texts(anchor), token_texts(positive))]
                )
            )
    return Mixture(sets, expected)


def samples_by_source(batches: list[UserBatch], num_sources: int) -> list[list[Sample]]:
    """Samples of each source in the order of the run, told by the groups that they are contrasted in."""
    found: list[list[Sample]] = [[] for _ in range(num_sources)]
    for batch in batches:
        for (key, anchor, positive), pair in zip(seen_by(batch), batch.service_pairs.tolist(), strict=True):
            source = pair // SOURCE_PAIRS
            found[source].append((key, repr(anchor), repr(positive)))
            assert {token // TOKENS_PER_SOURCE for item in anchor + positive for token in item} == {source}
    return found


def check(mixture: Mixture, batch: int, seed: int, num_steps: int, world_sizes: set[int], starts: set[int]) -> None:
    """Every sample of every source exactly once per epoch; no trace of workers and restarts, whatever is drawn."""
    plain = mixture.stream(batch, seed, num_steps, AugmentConfig())
    assert plain.plan.num_samples == tuple(expected.total() for expected in mixture.expected)
    found = samples_by_source(list(plain.batches()), len(mixture.sets))
    assert sum(map(len, found)) == num_steps * batch
    coverages = plain.plan.coverage(num_steps)
    for expected, samples, coverage in zip(mixture.expected, found, coverages, strict=True):
        size = expected.total()
        epochs = [Counter(samples[start : start + size]) for start in range(0, len(samples), size)]
        assert all(epoch == expected for epoch in epochs[: coverage.epochs])
        assert sum(map(Counter.total, epochs)) == coverage.epochs * size + coverage.begun
        assert len(epochs) == coverage.epochs + (coverage.begun > 0)
        assert epochs[-1:] == [] or epochs[-1] <= expected

    stream = mixture.stream(batch, seed, num_steps, RANDOM)
    alone = [seen_by(whole) for (whole,) in steps(stream, 1)]
    for world_size in world_sizes:
        for start in starts | {0}:
            parted = steps(stream, world_size, start)
            assert [[seen for part in ranks for seen in seen_by(part)] for ranks in parted] == alone[start:]
            assert [part.step for ranks in parted for part in ranks] == [
                step for step in range(start, num_steps) for _ in range(world_size)
            ]


@st.composite
def contents(draw: st.DrawFn) -> tuple[list[list[list[Group]]], list[float]]:
    """Tables of one to three sources that all have a training sample, and their weights."""
    found = draw(st.lists(tables(), min_size=1, max_size=3).map(lambda sources: [s for s in sources if count(s)]))
    return found, [draw(st.floats(0.1, 10)) for _ in found]


def count(shards: list[list[Group]]) -> int:
    """Training samples of a table."""
    users = [user for shard in shards for group in shard for user in group]
    return len(tokenized.list_samples(users, VIEWS.kinds, "train"))


def fuzz(source: tuple[list[list[list[Group]]], list[float]], data: st.DataObject) -> None:
    shards, weights = source
    if not shards:
        return
    limit = int(min(count(s) * sum(weights) / weight * (1 - 1e-9) for s, weight in zip(shards, weights, strict=True)))
    batch = data.draw(st.integers(1, max(1, min(limit, 12))), label="batch")
    num_steps = data.draw(st.integers(0, 1 + 2 * max(map(count, shards)) // batch), label="steps")
    world_sizes = data.draw(st.sets(st.integers(1, batch), max_size=2), label="workers")
    starts = data.draw(st.sets(st.integers(0, num_steps), max_size=2), label="starts")
    with tempfile.TemporaryDirectory() as directory:
        mixture = write_mixture(Path(directory), shards, weights)
        check(mixture, batch, data.draw(st.integers(0, 2**33), label="seed"), num_steps, world_sizes, starts)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(contents(), st.data())
def test_random_tables_are_consumed_exactly_once(source: tuple[list[list[list[Group]]], list[float]], data):
    fuzz(source, data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(contents(), st.data())
def test_many_random_tables_are_consumed_exactly_once(source: tuple[list[list[list[Group]]], list[float]], data):
    fuzz(source, data)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Two tables of twelve and five row groups; the smaller one has a third of the weight."""
    rng = np.random.default_rng(0)

    def user(number: int) -> tokenized.User:
        histories = {s: [(str(rng.integers(10)), 100 + t) for t in range(rng.integers(1, 6))] for s in range(2)}
        return tokenized.User(f"user {number}", "train", histories)

    def table(num_groups: int) -> list[list[Group]]:
        return [[[user(7 * group + number) for number in range(7)] for group in range(num_groups)]]

    return write_mixture(tmp_path_factory.mktemp("mixture"), [table(12), table(5)], [2.0, 1.0])


def test_every_batch_of_a_mixture_holds_the_stated_proportions(mixture: Mixture):
    stream = mixture.stream(batch=9, seed=1, num_steps=60, augment=RANDOM)
    for batch in stream.batches():
        # Exactly 6 and 3, but for the rounding of half a sample at either end of a batch.
        assert Counter((batch.service_pairs // SOURCE_PAIRS).tolist())[1] in (2, 3, 4)
    small = stream.plan.coverage(60)[1]
    assert abs(small.epochs * small.samples + small.begun - 180) <= 1
    check(mixture, 9, seed=1, num_steps=60, world_sizes={4, 5}, starts={1, 37})


def test_items_and_groups_are_one_source_s_own_and_users_are_common(mixture: Mixture):
    stream = mixture.stream(batch=9, seed=1, num_steps=60, augment=AugmentConfig())
    keys: list[set[int]] = [set(), set()]
    users: list[set[int]] = [set(), set()]
    for batch in stream.batches():
        for source in range(2):
            mine = batch.service_pairs // SOURCE_PAIRS == source
            keys[source] |= set(batch.positive_item_keys[mine].tolist())
            users[source] |= set(batch.user_keys[mine].tolist())
    assert len(keys[0]) == len(keys[1]) == 10
    assert not keys[0] & keys[1]
    assert users[1] < users[0]


def test_a_single_table_is_the_same_with_any_weight(mixture: Mixture):
    batches = [
        list(open_stream([set_], VIEWS, RANDOM, 5, 0, 20).batches())
        for set_ in (mixture.sets[0], replace(mixture.sets[0], weight=7.0))
    ]
    assert [seen_by(one) for one in batches[0]] == [seen_by(other) for other in batches[1]]


def test_tables_of_different_tokenizers_are_refused(tmp_path: Path):
    for name, digest in (("a", "1" * 64), ("b", "1" * 64), ("c", "2" * 64)):
        (tmp_path / name).mkdir()
        facts = {"tokenizer_digest": digest, "shards": [{"shard": 0, "row_groups": []}]}
        write_manifest(tmp_path / name, Manifest(table="shards", stage="tokenize", config={}, facts=facts))
    sets = read_shard_sets([(tmp_path / "a", 2.0), (tmp_path / "b", 0.5)])
    assert [(s.directory, s.weight, s.shards) for s in sets] == [
        (tmp_path / "a", 2.0, [{"shard": 0, "row_groups": []}]),
        (tmp_path / "b", 0.5, [{"shard": 0, "row_groups": []}]),
    ]
    with pytest.raises(TokenizerMismatchError, match=r"c was made with tokenizer 222222222222, but 111111111111"):
        read_shard_sets([(tmp_path / "a", 1.0), (tmp_path / "c", 1.0)])
