"""The split against plain loops over lists of users."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.ingested import draw_shards
from tests.support.tokenized import Group, User, item_tokens, write_shards
from userrep.data.leave_one_out import LeaveOneOut, Sequences, load_leave_one_out


def load(directory: Path, shards: list[list[Group]]) -> LeaveOneOut:
    return load_leave_one_out(directory, write_shards(directory, shards))


def in_time_order(user: User) -> list[str]:
    events = [
        (float("-inf") if time is None else time, service, place, item)
        for service, history in user.histories.items()
        for place, (item, time) in enumerate(history)
    ]
    return [item for *_, item in sorted(events)]


def as_ids(split: LeaveOneOut, sequences: Sequences) -> list[list[str]]:
    names = np.array(split.item_ids.to_pylist())
    return [names[part].tolist() for part in np.split(sequences.items, sequences.offsets[1:-1])]


@pytest.mark.parametrize("seed", range(4))
def test_split_is_that_of_plain_lists(tmp_path: Path, seed: int) -> None:
    shards = draw_shards(seed)
    split = load(tmp_path, shards)
    by_id = {user.user_id: in_time_order(user) for shard in shards for group in shard for user in group}
    names = split.user_ids.to_pylist()
    assert sorted(names) == sorted(by_id)
    assert (np.diff(split.keys.astype(object)) > 0).all()
    assert as_ids(split, split.events) == [by_id[name] for name in names]
    asked = [name for name in names if len(by_id[name]) >= 3]
    assert 0 < len(asked) < len(names)
    assert [names[user] for user in split.asked] == asked
    expected = [by_id[name][:-2] if name in asked else by_id[name] for name in names]
    assert as_ids(split, split.train) == expected
    items = split.item_ids.to_pylist()
    for held, place in (("validation", -2), ("test", -1)):
        assert as_ids(split, split.histories(held)) == [by_id[name][:place] for name in asked]
        assert [items[number] for number in split.targets(held)] == [by_id[name][place] for name in asked]
    counts = [sum(history.count(item) for history in expected) for item in items]
    assert split.train_counts().tolist() == counts


def test_catalogue_holds_every_item_with_events_and_its_tokens_once(tmp_path: Path) -> None:
    shards = draw_shards(1)
    split = load(tmp_path, shards)
    items = {item for shard in shards for group in shard for user in group for item in in_time_order(user)}
    assert split.item_ids.to_pylist() == sorted(items)
    parts = np.split(split.tokens, split.token_offsets[1:-1])
    assert [part.tolist() for part in parts] == [item_tokens(item) for item in sorted(items)]


def test_split_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    shards = draw_shards(2)
    users = [user for shard in shards for group in shard for user in group]
    one, other = load(tmp_path / "a", shards), load(tmp_path / "b", [[users[::-1]]])
    assert one.user_ids.equals(other.user_ids)
    assert one.item_ids.equals(other.item_ids)
    for name in ("tokens", "token_offsets", "keys"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_array_equal(one.events.items, other.events.items)
    np.testing.assert_array_equal(one.events.offsets, other.events.offsets)


def test_shares_are_nested_and_of_the_stated_size(tmp_path: Path) -> None:
    split = load(tmp_path, draw_shards(3))
    shares = [set(split.train_share(share, seed=5).tolist()) for share in (0.01, 0.05, 0.5, 1.0)]
    assert [len(users) for users in shares] == [1, 2, 20, 40]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert shares[2] != set(split.train_share(0.5, seed=6).tolist())
    for share in (0, 1.5):
        with pytest.raises(ValueError, match=r"not in \(0, 1\]"):
            split.train_share(share, seed=0)


def test_cold_items_are_in_no_history_of_those_who_train(tmp_path: Path) -> None:
    history = [("a", 1), ("b", 2), ("c", 3), ("d", 4)]
    users = [User("u0", "train", {0: history}), User("u1", "train", {0: [("d", 1), ("a", 2), ("b", 3)]})]
    split = load(tmp_path, [[users]])
    by_name = dict(zip(np.array(split.user_ids.to_pylist())[split.asked], split.is_cold(), strict=True))
    assert by_name == {"u0": False, "u1": False}  # u1 trains on d, u0 on a and b
    only_u0 = np.flatnonzero(np.array(split.user_ids.to_pylist()) == "u0")
    cold = dict(zip(np.array(split.user_ids.to_pylist()), split.is_cold("test", only_u0), strict=True))
    assert cold == {"u0": True, "u1": False}
    cold = dict(zip(np.array(split.user_ids.to_pylist()), split.is_cold("validation", only_u0), strict=True))
    assert cold == {"u0": True, "u1": False}  # c is in no history, a is


def test_sequences_are_cut_taken_and_padded_row_by_row() -> None:
    sequences = Sequences(np.arange(6, dtype=np.int32), np.array([0, 3, 3, 4, 6]))
    recent = sequences.recent(2)
    assert (recent.items.tolist(), recent.offsets.tolist()) == ([1, 2, 3, 4, 5], [0, 2, 2, 3, 5])
    assert recent.padded(3).tolist() == [[2, 3, 0], [0, 0, 0], [4, 0, 0], [5, 6, 0]]
    taken = sequences.take(np.array([3, 0]))
    assert (taken.items.tolist(), taken.offsets.tolist()) == ([4, 5, 0, 1, 2], [0, 2, 5])
    with pytest.raises(ValueError, match=r"3 items does not fit in rows of 2: call recent\(2\)"):
        sequences.padded(2)


def test_nobody_to_ask_is_an_error(tmp_path: Path) -> None:
    for number, shards in enumerate(([[]], [[[User("u0", "train", {0: [("a", 1), ("b", 2)]})]]])):
        with pytest.raises(ValueError, match="has 3 events, and leave-one-out"):
            load(tmp_path / str(number), shards)
