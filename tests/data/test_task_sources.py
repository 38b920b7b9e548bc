"""Tasks against a plain re-statement of what they ask, sample by sample."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.sources.reading import read
from tests.support.memory_source import MemorySource, event, item
from tests.support.shared_data import shared_data
from userrep.config import ConfigError
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.task_sources import ml1m_tasks, synthetic_tasks
from userrep.data.tasks import Task, TaskSet, TaskSplit

Sample = tuple[str, str]  # user id, class
EVEN = TaskSplit(validation=0.3, test=0.3)  # so that no split of a small task is empty


def samples(tasks: TaskSet, task: Task) -> list[Sample]:
    users = tasks.sequences.user_ids.to_pylist()
    return [(users[row], task.classes[label]) for row, label in zip(task.rows, task.labels, strict=True)]


def histories(tasks: TaskSet) -> dict[str, list[str]]:
    names = tasks.sequences.item_ids
    rows = [[names[number] for number in row if number] for row in tasks.sequences.items.tolist()]
    return dict(zip(tasks.sequences.user_ids.to_pylist(), rows, strict=True))


def by_user(events: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Events of each user, oldest first, users in the order in which they appear."""
    found = defaultdict(list)
    for record in events:
        found[record["user_id"]].append(record)
    return {user: sorted(records, key=lambda record: record["time"]) for user, records in found.items()}


def expect_ids(events: list[dict[str, Any]], limit: int | None) -> list[str]:
    """Items of the most recent events, oldest first, one that is there twice once."""
    return list(dict.fromkeys(record["item_id"] for record in (events if limit is None else events[-limit:])))


def movielens(rng: np.random.Generator) -> MemorySource:
    """Ratings with ties of time, repetitions, items that no table knows, profiles that lack labels."""
    movies = [item(f"m{n}") for n in rng.permutation(12)]
    times = rng.integers(0, 40, 900)
    events = [
        event(f"u{user}", f"m{movie}", line, service="rating", time=int(times[line]), value=float(value))
        for line, (user, movie, value) in enumerate(
            zip(rng.integers(0, 60, 900), rng.integers(0, 13, 900), rng.integers(1, 6, 900), strict=True)
        )
    ]
    # One user with a single rating below 4, one with none.
    events += [event("one", "m1", 900, service="rating", value=2.0), event("one", "m2", 901, value=5.0)]
    events += [event("none", "m3", 902, service="rating", value=4.0), {**events[0], "reason": "bad_value", "id": None}]
    events[-1] = {"table": "events", "file": "f", "line": 1, "id": None, "reason": "bad_value", "record": ""}
    users = []
    for n in range(60):
        labels = {"gender": "FM"[n % 2], "age": f"{n % 3}0s"} | ({"occupation": "writer"} if n % 4 else {})
        users.append({"user_id": f"u{n}", "labels": list(labels.items()), "file": "users", "line": n})
    return MemorySource(("rating",), [[movies]], [[events[:300]], [events[300:500], events[500:]]], [[users[:-1]]])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(2, 8), st.sampled_from([None, 1, 3]))
def test_movielens_tasks_are_what_they_say(seed: int, max_items: int, max_targets: int | None):
    source = movielens(np.random.default_rng(seed))
    tasks = ml1m_tasks(source, EVEN, max_items, max_targets)
    movies = [record["item_id"] for record in source.items[0][0]]
    batches = [batch for part in source.events for batch in part]
    events = [record for batch in batches for record in batch if "reason" not in record]
    known = [record for record in events if record["item_id"] in movies]
    users = by_user(known)
    low = {user: [r["item_id"] for r in records if r["value"] < 4] for user, records in users.items()}
    rows = [user for user in users if len(low[user]) >= 2]

    assert list(histories(tasks).items()) == [(user, low[user][-max_items:]) for user in rows]
    used = {name for names in histories(tasks).values() for name in names}
    assert list(tasks.sequences.item_ids) == ["", *(name for name in movies if name in used)]
    assert tasks.sequences.texts == ("", *(f"text of {name}" for name in tasks.sequences.item_ids[1:]))
    assert [task.name for task in tasks.tasks] == ["T1", "T2", "T3", "T4", "T5", "T6"]
    assert [task.kind for task in tasks.tasks] == ["next_item", "item", "item", "label", "label", "label"]

    first, four, five, gender, age, occupation = tasks.tasks
    assert samples(tasks, first) == [(user, low[user][-1]) for user in rows]
    for task, value in ((four, 4), (five, 5)):
        wanted = {user: [record for record in users[user] if record["value"] == value] for user in rows}
        expected = [(user, name) for user in rows for name in expect_ids(wanted[user], max_targets)]
        assert Counter(samples(tasks, task)) == Counter(expected)
        assert list(task.classes) == [name for name in movies if name in {target for _, target in expected}]
        assert tasks.facts[f"{task.name}_users_without_sample"] == len(rows) - len({user for user, _ in expected})
        recent = sum(len(w if max_targets is None else w[-max_targets:]) for w in wanted.values())
        assert tasks.facts[f"{task.name}_repeated_targets"] == recent - len(expected)
    profiles = {record["user_id"]: dict(record["labels"]) for record in source.users[0][0]}
    for task, label in ((gender, "gender"), (age, "age"), (occupation, "occupation")):
        has_label = [user for user in rows if label in profiles.get(user, {})]
        assert samples(tasks, task) == [(user, profiles[user][label]) for user in has_label]
        assert list(task.classes) == sorted(task.classes)
        assert tasks.facts[f"{task.name}_users_without_sample"] == len(rows) - len(has_label)
    assert tasks.facts["users"] == len(users) == len(rows) + sum(len(low[user]) < 2 for user in users)
    assert tasks.facts["users_without_history"] == sum(not low[user] for user in users)
    assert tasks.facts["users_with_one_item"] == sum(len(low[user]) == 1 for user in users)
    assert tasks.facts["events_of_unknown_items"] == len(events) - len(known)
    assert tasks.facts["rejected_events"] == 1


def test_one_user_one_split_in_all_tasks():
    tasks = ml1m_tasks(movielens(np.random.default_rng(0)), EVEN)
    of_user: dict[int, int] = {}
    for task in tasks.tasks:
        for row, split in zip(task.rows.tolist(), task.split.tolist(), strict=True):
            assert of_user.setdefault(row, split) == split
    by_sample = ml1m_tasks(movielens(np.random.default_rng(0)), TaskSplit(by="sample"))
    assert (by_sample.sequences.items == tasks.sequences.items).all()
    four = by_sample.tasks[1]
    splits_of_user = {row: set(four.split[four.rows == row].tolist()) for row in four.rows.tolist()}
    assert any(len(splits) > 1 for splits in splits_of_user.values())


def test_settings_and_data_that_cannot_be_used():
    source = movielens(np.random.default_rng(0))
    with pytest.raises(ConfigError, match="max_items is 1"):
        ml1m_tasks(source, EVEN, max_items=1)
    with pytest.raises(ConfigError, match="max_targets is 0"):
        ml1m_tasks(source, EVEN, max_targets=0)
    with pytest.raises(ConfigError, match=r"no user has the label 'gender': .* hold \[\]"):
        ml1m_tasks(source._replace(users=[]), EVEN)
    unrated = [[[event("a", "m1", 1), event("a", "m2", 2)]]]
    with pytest.raises(ConfigError, match="2 events have no rating"):
        ml1m_tasks(source._replace(events=unrated), EVEN)
    with pytest.raises(ConfigError, match="none of 0 users"):
        ml1m_tasks(source._replace(events=[]), EVEN)


def test_synthetic_tasks_are_what_they_say():
    source = SyntheticSource(seed=5, num_users=150, num_items=300, num_topics=12, num_departments=3, events_per_user=3)
    tasks = synthetic_tasks(source, EVEN, max_items=7, max_targets=3)
    texts = {record["item_id"]: record["text"] for record in read(source, "items")[0]}
    labels = {record["user_id"]: dict(record["labels"]) for record in read(source, "users")[0]}
    users = by_user(read(source, "events")[0])
    searched = {user: [r["item_id"] for r in records if r["service"] == "search"] for user, records in users.items()}
    bought = {user: [r for r in records if r["service"] == "shop"] for user, records in users.items()}
    rows = [user for user in users if len(searched[user]) >= 2]
    assert 0 < len(rows) < len(users)  # some users searched once

    assert list(histories(tasks).items()) == [(user, searched[user][-7:]) for user in rows]
    assert tasks.sequences.texts is not None
    assert tasks.sequences.texts[1:] == tuple(texts[name] for name in tasks.sequences.item_ids[1:])
    first, product, minor, major, gender, age = tasks.tasks
    assert [task.kind for task in tasks.tasks] == ["next_item", "item", "label", "label", "label", "label"]
    assert samples(tasks, first) == [(user, searched[user][-1]) for user in rows]
    expected = [(user, name) for user in rows for name in expect_ids(bought[user], 3)]
    assert Counter(samples(tasks, product)) == Counter(expected)
    # A product's text ends with its department and its topic.
    latest = {user: texts[bought[user][-1]["item_id"]].split() for user in rows}
    assert samples(tasks, minor) == [(user, latest[user][-1]) for user in rows]
    assert samples(tasks, major) == [(user, latest[user][-2]) for user in rows]
    assert samples(tasks, gender) == [(user, labels[user]["gender"]) for user in rows]
    assert samples(tasks, age) == [(user, labels[user]["age_band"]) for user in rows]
    assert tasks.facts["users"] == 150
    assert tasks.facts["users_with_one_item"] == 150 - len(rows)


def test_tasks_do_not_depend_on_the_call():
    source = SyntheticSource(num_users=200, num_items=200)
    one, two = (synthetic_tasks(source) for _ in range(2))
    assert (one.sequences.items == two.sequences.items).all()
    for left, right in zip(one.tasks, two.tasks, strict=True):
        assert left.classes == right.classes
        for name in ("rows", "labels", "split"):
            assert (getattr(left, name) == getattr(right, name)).all()


def test_movielens_in_the_numbers_of_the_real_set():
    folder = shared_data("ml1m_users1_2999")
    tasks = ml1m_tasks(ParquetSource(path=folder))
    events = pq.read_table(folder / "events.parquet").to_pandas()
    low = events[events.value < 4].groupby("user_id").size().reindex(events.user_id.unique(), fill_value=0)
    rows = low.index[low >= 2]
    assert tasks.sequences.user_ids.to_pylist() == rows.to_list()
    assert tasks.facts["users_without_history"] == (low == 0).sum()
    assert tasks.facts["users_with_one_item"] == (low == 1).sum()
    assert ((tasks.sequences.items > 0).sum(axis=1) == np.minimum(low[low >= 2], 30)).all()
    for task, value in zip(tasks.tasks[1:3], (4, 5), strict=True):
        rated = events[(events.value == value) & events.user_id.isin(rows)]
        assert len(task.rows) == len(rated)
        assert task.num_classes == rated.item_id.nunique()
    assert [task.num_classes for task in tasks.tasks[3:]] == [2, 7, 21]  # as the set's README has it
    test_rows = tasks.tasks[0].rows[tasks.tasks[0].samples("test")]
    assert len(test_rows) == round(0.15 * len(rows))
