"""Probe users against plain loops over lists of users."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse

from tests.support.ingested import draw_shards
from tests.support.tokenized import Group, User, token_texts, write_shards
from userrep.data import probe_users
from userrep.data.batch import HistoryBatch
from userrep.data.probe_users import UNKNOWN, ProbeUsers, load_probe_users


def load(directory: Path, shards: list[list[Group]], *limits: int) -> ProbeUsers:
    facts: list[dict[str, Any]] = write_shards(directory, shards)
    return load_probe_users(directory, facts, *limits)


def first_users(shards: list[list[Group]], num_train: int, num_test: int) -> list[User]:
    chosen: list[User] = []
    for user in (user for shard in shards for group in shard for user in group):
        num_chosen = sum((other.split == "train") == (user.split == "train") for other in chosen)
        if num_chosen < (num_train if user.split == "train" else num_test):
            chosen.append(user)
    return chosen


def last_event(user: User) -> tuple[int, int]:
    """Service and place."""
    events = [
        (float("-inf") if time is None else time, service, place)
        for service, history in user.histories.items()
        for place, (_, time) in enumerate(history)
    ]
    return max(events)[1:]


def histories_before(user: User) -> list[list[Any]]:
    last_service, last_place = last_event(user)
    cut = {
        service: history[:last_place] if service == last_service else history
        for service, history in user.histories.items()
    }
    return [history for history in cut.values() if history]


def shown(batch: HistoryBatch, membership: scipy.sparse.csr_matrix) -> list[list[list[list[int]]]]:
    """Of each user its histories as tokens of their events, sorted."""
    items = np.split(batch.tokens, batch.token_offsets[1:-1])
    histories = np.split(batch.history_items, batch.history_offsets[1:-1])
    texts = [[items[item].tolist() for item in history] for history in histories]
    return [sorted(texts[number] for number in row.indices) for row in membership]


def as_tokens(histories: list[list[Any]], max_events: int) -> list[list[list[int]]]:
    return sorted(token_texts(history[-max_events:]) for history in histories)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("num_train", "num_test"), [(3, 7), (9, 2), (1000, 1000)])
def test_users_and_histories_are_those_of_the_reference(tmp_path: Path, seed: int, num_train: int, num_test: int):
    shards = draw_shards(seed)
    users = load(tmp_path, shards, num_train, num_test, 4)
    expected = first_users(shards, num_train, num_test)
    assert users.group.user_ids.to_pylist() == [user.user_id for user in expected]
    assert users.is_train.tolist() == [user.split == "train" for user in expected]
    for max_events in (1, 3, 4):
        sizes = [sum(min(len(h), max_events) for h in user.histories.values()) for user in expected]
        assert users.num_events(max_events).tolist() == sizes
        for start, stop in ((0, len(users)), (1, 3), (len(users) - 1, len(users))):
            batch, chosen = users.batch(start, stop, max_events), expected[start:stop]
            whole = [as_tokens(list(user.histories.values()), max_events) for user in chosen]
            before = [as_tokens(histories_before(user), max_events) for user in chosen]
            assert shown(batch.histories, batch.whole) == whole
            assert shown(batch.histories, batch.before) == before
            assert [bool(rows) for rows in before] == users.has_before[start:stop].tolist()
            only_before = users.batch(start, stop, max_events, is_whole=False)
            assert shown(only_before.histories, only_before.before) == before
            assert only_before.whole.nnz == 0
            assert len(only_before.histories.history_offsets) - 1 == sum(map(len, before))
            only_whole = users.batch(start, stop, max_events, is_before=False)
            assert shown(only_whole.histories, only_whole.whole) == whole
            assert len(only_whole.histories.history_offsets) - 1 == sum(map(len, whole))


def test_targets_are_the_last_items(tmp_path: Path):
    shards = draw_shards(7)
    users = load(tmp_path, shards, 20, 20, 2)
    found = users.group.item_ids.take(users.group.items[users.targets]).to_pylist()
    expected = []
    for user in first_users(shards, 20, 20):
        service, place = last_event(user)
        expected.append(user.histories[service][place][0])
    assert found == expected


def test_an_item_stands_once(tmp_path: Path):
    users = load(tmp_path, draw_shards(3), 20, 20, 2)
    ids = users.group.item_ids.to_pylist()
    assert len(set(ids)) == len(ids) == len(np.unique(users.group.items))


def test_labels_are_those_that_enough_training_users_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe_users, "MIN_LABELLED", 4)
    monkeypatch.setattr(probe_users, "MIN_PER_CLASS", 2)

    def user(number: int, split: str, **labels: str) -> User:
        return User(f"u{number}", split, {0: [("a", 1), ("b", 2)]}, tuple(labels.items()))

    train = [
        user(0, "train", sex="F", one="x", name="n0", rare="1", unseen="p"),
        user(1, "train", sex="M", one="x", name="n0", rare="2", unseen="q"),
        user(2, "train", sex="M", one="x", name="n2", rare="3", unseen="q"),
        user(3, "train", sex="F", one="x", name="n3", unseen="q"),
        user(4, "train", one="x"),
    ]
    test = [
        user(5, "validation", sex="M", one="y", rare="1", unseen="z"),
        user(6, "test", sex="other"),
        user(7, "test"),
    ]
    users = load(tmp_path, [[train[:2], [*train[2:], *test]]], 10, 10, 5)
    # `one` has one class, `name` three of four users, `rare` three users, `unseen` no held-out user of a known class.
    assert list(users.labels) == ["sex"]
    assert users.labels["sex"].classes == ("F", "M")
    assert users.labels["sex"].labels.tolist() == [0, 1, 1, 0, UNKNOWN, 1, UNKNOWN, UNKNOWN]


def test_unusable_numbers_are_refused(tmp_path: Path):
    one = [User("u", "train", {0: [("a", 1)]})]
    facts = write_shards(tmp_path, [[one]])
    with pytest.raises(ValueError, match="1 training users and 0 held-out ones"):
        load_probe_users(tmp_path, facts, 5, 5, 5)
    for limits in ((0, 1, 1), (1, 0, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="all must be >= 1"):
            load_probe_users(tmp_path, facts, *limits)


@pytest.mark.parametrize("max_events", [0, 4])
def test_more_events_than_were_loaded_are_refused(tmp_path: Path, max_events: int):
    users = load(tmp_path, draw_shards(0), 5, 5, 3)
    with pytest.raises(ValueError, match=f"max_events is {max_events}: these users were loaded with 3"):
        users.batch(0, 2, max_events)
