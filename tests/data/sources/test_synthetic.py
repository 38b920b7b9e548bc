import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from tests.data.sources.reading import read_part, read_tables
from userrep.config import ConfigError
from userrep.data.sources import synthetic
from userrep.data.sources.source import TableName
from userrep.data.sources.synthetic import (
    AGE_BANDS,
    DAY_S,
    GENDERS,
    LIFE_STAGES,
    START_TIME,
    SyntheticSource,
    standard_traits,
)
from userrep.data.sources.world import CHUNK_ITEMS, CHUNK_USERS, SERVICES, build_world

SMALL = SyntheticSource(num_users=300, num_items=500, events_per_user=10)


@pytest.mark.parametrize("table", ["items", "events", "users"])
def test_the_same_config_gives_the_same_rows(table: TableName):
    rows, rejected = read_tables(SMALL, table)
    assert rows.equals(read_tables(SMALL, table)[0])
    assert rejected.num_rows == 0
    assert not rows.equals(read_tables(SMALL.model_copy(update={"seed": 1}), table)[0])


@pytest.mark.parametrize("table", ["events", "users"])
def test_more_users_leave_the_earlier_ones_as_they_are(table: TableName):
    few, _ = read_tables(SMALL, table)
    more = SMALL.model_copy(update={"num_users": CHUNK_USERS + 5})
    assert len(more.parts(table)) == 2
    first, _ = read_part(more.parts(table)[0], table)
    assert first.slice(0, few.num_rows).equals(few)
    second, _ = read_part(more.parts(table)[1], table)
    assert set(second["user_id"].to_pylist()) == {
        f"user-{number:07d}" for number in range(CHUNK_USERS, CHUNK_USERS + 5)
    }


def test_events_refer_to_items_of_their_service_in_order_of_time():
    items, _ = read_tables(SMALL, "items")
    assert items["item_id"].to_pylist() == [f"{name}-{number:07d}" for name in SERVICES for number in range(500)]
    events, _ = read_tables(SMALL, "events")
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
    last: dict[tuple[str, str], tuple[int, int]] = {}
    for row in events.to_pylist():
        assert row["item_id"].startswith(row["service"])
        assert START_TIME <= row["time"] < START_TIME + SMALL.num_periods * SMALL.period_days * DAY_S
        assert (row["value"] is None) == (row["service"] == "search")
        time, position = last.get((row["user_id"], row["service"]), (0, -1))
        assert row["time"] >= time
        assert row["position"] == position + 1
        last[row["user_id"], row["service"]] = row["time"], row["position"]
    assert len(last) == 2 * SMALL.num_users  # every user has events in both services


def test_number_of_events_has_the_mean_that_was_asked_for():
    source = SyntheticSource(num_users=CHUNK_USERS, num_items=100)
    events, _ = read_tables(source, "events")
    mean = events.num_rows / (2 * CHUNK_USERS)
    # The standard error of the mean of 4,096 lognormal numbers of relative deviation sqrt(exp(.5^2) - 1) = .53 is .2.
    assert mean == pytest.approx(24, abs=4 * 0.2)


def test_item_chunks_are_cut_at_the_last_item():
    source = SyntheticSource(num_items=CHUNK_ITEMS + 3)
    counts = [read_part(part, "items")[0].num_rows for part in source.parts("items")]
    assert counts == [CHUNK_ITEMS, 3, CHUNK_ITEMS, 3]


@pytest.mark.parametrize("num_items", [1, 5, 64])
def test_worlds_with_hardly_any_items(num_items: int):
    source = SyntheticSource(num_users=20, num_items=num_items, num_topics=num_items)
    events, _ = read_tables(source, "events")
    allowed = {f"{name}-{number:07d}" for name in SERVICES for number in range(num_items)}
    assert set(events["item_id"].to_pylist()) <= allowed
    with pytest.raises(ConfigError, match=f"num_items {num_items} < num_topics {num_items + 1}"):
        SyntheticSource.parse({"num_items": num_items, "num_topics": num_items + 1})


def test_drawing_in_blocks_of_users_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    whole, _ = read_tables(SMALL, "events")
    monkeypatch.setattr(synthetic, "MAX_PROBABILITIES", 100 * SMALL.num_periods * SMALL.num_topics)
    assert read_tables(SMALL, "events")[0].equals(whole)


def test_texts_share_the_words_of_their_topic_across_services():
    world = build_world(SMALL)
    topics = world.topics_of(np.arange(500))
    search, shop = world.item_texts(0, 0), world.item_texts(1, 0)
    words = [set(" ".join(np.array(search)[topics == topic]).split()) for topic in range(64)]
    shop_words = [set(" ".join(np.array(shop)[topics == topic]).split()) for topic in range(64)]
    same = np.mean([len(words[topic] & shop_words[topic]) for topic in range(64)])
    other = np.mean([len(words[topic] & shop_words[(topic + 1) % 64]) for topic in range(64)])
    assert same > 3
    assert other == 0  # words are distinct between topics; only the department's word is shared, and queries lack it
    assert all(len(text.split()) == 6 for text in shop)
    assert {len(text.split()) for text in search} == {1, 2, 3}


def test_draws_follow_the_model():
    """Drawn items against the exact softmax over all items, for users of one constant interest."""
    source = SyntheticSource(num_users=CHUNK_USERS, num_items=40, num_topics=6, drift=0, events_per_user=30)
    world = build_world(source)
    interests = world.interests(0)
    assert np.array_equal(interests[:, 0], interests[:, -1])
    events, _ = read_tables(source, "events")
    for service, name in enumerate(SERVICES):
        mine = events.filter(pa.array([value == name for value in events["service"].to_pylist()]))
        users = np.array([int(user_id[5:]) for user_id in mine["user_id"].to_pylist()])
        items = np.array([int(item_id[-7:]) for item_id in mine["item_id"].to_pylist()])
        topics = world.topics_of(np.arange(40))
        shares = np.exp(world.item_log_shares(np.arange(40)))
        affinity = source.sharpness * interests[:, 0] @ world.topic_vectors[:, topics]
        naive = np.exp(affinity) * np.exp(world.topic_log_weights[service, topics]) * shares
        naive /= naive.sum(axis=1, keepdims=True)
        expected = naive[users].sum(axis=0)  # of each item, given the users' numbers of events
        deviation = np.sqrt((naive * (1 - naive))[users].sum(axis=0))
        observed = np.bincount(items, minlength=40)
        # 40 items: the largest of 40 normal deviates stays below 4.5 with probability .9997 (and the seed is fixed).
        assert np.abs((observed - expected) / deviation).max() < 4.5


def test_interests_drift_and_stay_of_one_size():
    source = SyntheticSource(drift=0.04)
    interests = build_world(source).interests(0)
    assert interests.std(axis=(0, 2)) == pytest.approx(np.ones(source.num_periods), abs=0.03)
    for lag in (1, 11):
        correlation = np.corrcoef(interests[:, 0].ravel(), interests[:, lag].ravel())[0, 1]
        assert correlation == pytest.approx(0.96**lag, abs=0.03)


def test_labels_depend_on_interests():
    source = SyntheticSource(num_users=CHUNK_USERS)
    users, _ = read_tables(source, "users")
    labels = [dict(pairs) for pairs in users["labels"].to_pylist()]
    assert {tuple(row) for row in labels} == {("gender", "age_band", "life_stage")}
    traits = standard_traits(build_world(source), build_world(source).interests(0))
    assert traits.std(axis=0) == pytest.approx(np.ones(6), abs=0.07)
    is_male = np.array([row["gender"] == GENDERS[1] for row in labels])
    stage = np.array([LIFE_STAGES.index(row["life_stage"]) for row in labels])
    age = np.array([AGE_BANDS.index(row["age_band"]) for row in labels])
    # Sign of a standard normal read through noise of deviation s: right in 1/2 + atan(1 / s) / pi of the cases.
    assert np.mean((traits[:, 0] > 0) == is_male) == pytest.approx(0.5 + np.arctan(2) / np.pi, abs=0.04)
    assert np.mean(traits[:, 2:].argmax(axis=1) == stage) > 0.6  # chance: .25
    assert np.corrcoef(traits[:, 1], age)[0, 1] > 0.8
    for values in (is_male, stage, age):
        shares = np.array(list(Counter(values.tolist()).values())) / CHUNK_USERS
        assert shares == pytest.approx(np.full(len(shares), 1 / len(shares)), abs=0.05)


def test_memory_of_a_part_does_not_depend_on_the_number_of_users():
    def peak_bytes(num_users: int, index: int) -> int:
        part = SyntheticSource(num_users=num_users, num_items=1000, events_per_user=5).parts("events")[index]
        tracemalloc.start()
        before = pa.total_allocated_bytes()
        sum(parsed.rows.nbytes for parsed in part())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert pa.total_allocated_bytes() - before < 1 << 20
        return peak

    peak_bytes(CHUNK_USERS, 0)  # what is allocated once only
    small = peak_bytes(2 * CHUNK_USERS, 0)
    assert peak_bytes(1000 * CHUNK_USERS, 999) < 1.5 * small


def test_no_file_is_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    read_tables(SMALL, "items")
    assert list(tmp_path.iterdir()) == []
