"""Candidates of the next item: which, whose, and that their vectors are those of their tokens alone."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.ingested import draw_shards
from tests.support.tokenized import User, write_shards
from userrep.data.probe_users import ProbeUsers, load_probe_users
from userrep.evaluation.next_item import next_item


def load(directory: Path, users: list[User]) -> ProbeUsers:
    return load_probe_users(directory, write_shards(directory, [[users]]), 100, 100, 5)


def test_users_with_something_before_are_asked_for_their_last_item(tmp_path: Path):
    shards = draw_shards(5)
    users = load_probe_users(tmp_path, write_shards(tmp_path, shards), 100, 100, 5)
    task, group = next_item(users), users.group
    by_id = {user.user_id: user for shard in shards for group in shard for user in group}
    sizes = [sum(map(len, by_id[name].histories.values())) for name in group.user_ids.to_pylist()]
    assert task.users.tolist() == [number for number, size in enumerate(sizes) if size > 1]
    last = group.items[users.targets[task.users]]
    assert np.unique(last)[task.labels].tolist() == last.tolist()
    assert len(task.vectors) == len(np.unique(last)) == task.labels.max() + 1
    np.testing.assert_allclose(np.linalg.norm(task.vectors, axis=1), 1, rtol=1e-5)


def test_cosines_are_those_of_tfidf_where_nothing_is_cut_off(tmp_path: Path):
    users = load(
        tmp_path, [User("u0", "train", {0: [("a", 1), ("k", 2)]}), User("u1", "test", {0: [("b", 1), ("u", 2)]})]
    )
    task = next_item(users)
    # Tokens of k: 749 to 751; of u: 819, 820; nothing in common, and their cosine stays 0.
    np.testing.assert_allclose(task.vectors @ task.vectors.T, np.eye(2), atol=1e-6)


def test_one_candidate_is_no_question(tmp_path: Path):
    users = load(
        tmp_path, [User(f"u{n}", split, {0: [("a", 1), ("b", 2)]}) for n, split in enumerate(["train", "test"])]
    )
    with pytest.raises(ValueError, match="2 users with at least two events have 1 last items"):
        next_item(users)
