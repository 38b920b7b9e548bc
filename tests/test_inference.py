"""User vectors: the mean over services, the same whatever else is in the row group."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.ingested import SERVICES, draw_shards
from tests.support.tokenized import User, write_ingested, write_shards
from userrep.data.shard_tasks import LabelQuestion, shard_tasks
from userrep.data.views import merge_row_groups, read_row_group
from userrep.inference import embedding_rows, encode_users
from userrep.models.clue import Clue, ClueConfig
from userrep.publishing.table import write_part
from userrep.task_vectors import recent_items
from userrep.training.encoders import ClueEncoder

VOCAB = 1000


@pytest.fixture
def model() -> Clue:
    torch.manual_seed(0)
    model = Clue(ClueConfig(dim=8, num_heads=2), VOCAB)
    for parameter in model.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def user(name: str, *histories: str) -> User:
    return User(
        name,
        "train",
        {service: [(item, 7 * place) for place, item in enumerate(items)] for service, items in enumerate(histories)},
    )


def test_vector_is_the_mean_of_the_services(tmp_path: Path, model: Clue) -> None:
    users = [user("both", "abca", "de"), user("first", "abca"), user("second", "de")]
    write_shards(tmp_path, [[users]])
    both, first, second = encode_users(ClueEncoder(model), read_row_group(tmp_path, 0, 0), max_events=64)
    np.testing.assert_allclose(both, (first + second) / np.linalg.norm(first + second), atol=1e-6)


def test_vector_depends_on_the_user_alone(tmp_path: Path, model: Clue) -> None:
    users = [user(f"user {n}", "abcdefghij"[n % 4 : n + 1], "jihg"[: 1 + n % 3]) for n in range(9)]
    write_shards(tmp_path, [[users], [[users[n]] for n in (4, 8, 0)]])
    together = encode_users(ClueEncoder(model), read_row_group(tmp_path, 0, 0), max_events=3)
    for number, n in enumerate((4, 8, 0)):
        alone = encode_users(ClueEncoder(model), read_row_group(tmp_path, 1, number), max_events=3)
        np.testing.assert_allclose(alone[0], together[n], atol=1e-6)
    merged, _ = merge_row_groups([read_row_group(tmp_path, 1, number) for number in range(3)])
    np.testing.assert_allclose(encode_users(ClueEncoder(model), merged, max_events=3), together[[4, 8, 0]], atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_state_what_they_were_computed_from(tmp_path: Path, model: Clue, dtype: str) -> None:
    unknown = User("untimed", "test", {0: [("a", None), ("b", None)]})
    write_shards(tmp_path / "shards", [[[user("both", "abca", "de"), unknown]]])
    group = read_row_group(tmp_path / "shards", 0, 0)
    vectors = encode_users(ClueEncoder(model), group, max_events=64)
    rows = embedding_rows(group, vectors, dtype, {})
    assert rows["num_events"].to_pylist() == [6, 2]
    assert rows["last_time"].to_pylist() == [21, None]
    np.testing.assert_allclose(
        np.stack(rows["embedding"].to_pylist()), vectors, atol=1e-6 if dtype == "float32" else 1e-3
    )
    assert write_part(tmp_path, 0, rows).rows == 2  # what the table format demands of rows holds


@pytest.mark.parametrize("max_items", [2, 5, 50])
def test_tasks_see_the_events_of_a_user_that_they_were_taught_on(tmp_path: Path, max_items: int) -> None:
    shards = draw_shards(seed=3)
    write_ingested(tmp_path / "ingested", SERVICES, shards)
    write_shards(tmp_path / "tokenized", shards)
    taught = shard_tasks(tmp_path / "ingested", [LabelQuestion(label="gender")], max_items, 1000).sequences
    expected = {
        user_id: [taught.item_ids[number] for number in row if number]
        for user_id, row in zip(taught.user_ids.to_pylist(), taught.items, strict=True)
    }
    num_events = {user.user_id: sum(map(len, user.histories.values())) for s in shards for g in s for user in g}
    num_users = 0
    for shard, row_groups in enumerate(shards):
        for number in range(len(row_groups)):
            group = read_row_group(tmp_path / "tokenized", shard, number)
            item_ids = group.item_ids.to_pylist()
            for user_id, row in zip(group.user_ids.to_pylist(), recent_items(group, max_items), strict=True):
                seen = [item_ids[reference - 1] for reference in row if reference]
                assert len(seen) == min(max_items, num_events[user_id])
                assert (user_id in expected) == (num_events[user_id] > 1)
                assert num_events[user_id] == 1 or seen == expected[user_id]
                num_users += user_id in expected
    assert num_users == len(expected) > 10
