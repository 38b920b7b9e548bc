"""Baselines against counts made by hand."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.tokenized import Group, User, item_tokens, write_shards
from userrep.data.pool import load_pool
from userrep.data.views import ViewConfig
from userrep.evaluation.baselines import popularity_scores, tfidf_scores

VOCAB = 1000


def history(items: str) -> list[tuple[str, int | None]]:
    return [(item, place) for place, item in enumerate(items)]


SHARDS: list[list[Group]] = [
    [
        [
            User("t1", "train", {0: history("aab"), 1: history("c")}),
            User("v1", "test", {0: history("ab"), 1: history("cd")}),
        ],
        [User("v2", "test", {0: history("e"), 1: history("ea")}), User("t2", "train", {1: history("abcf")})],
    ],
    [[User("v3", "validation", {0: history("dddddd"), 1: history("dd")}), User("t3", "train", {0: history("cc")})]],
]


def test_popularity_counts_training_events_alone(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, SHARDS)
    pool = load_pool(tmp_path, shards, ViewConfig(), "test", 10)
    users = [user for shard in SHARDS for group in shard for user in group]
    counts = Counter(
        item for user in users if user.split == "train" for view in user.histories.values() for item, _ in view
    )
    means = {
        (user.user_id, service): np.mean([math.log1p(counts[item]) for item, _ in view])
        for user in users
        for service, view in user.histories.items()
    }
    expected = [[means[one, 0] + means[other, 1] for other in pool.user_ids()] for one in pool.user_ids()]
    assert pool.user_ids() == ["v1", "v2"]
    np.testing.assert_allclose(popularity_scores(pool, tmp_path, shards), expected)


def test_tfidf_is_the_cosine_of_weighted_token_counts(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, SHARDS)
    pool = load_pool(tmp_path, shards, ViewConfig(), "test", 10)
    users = {user.user_id: user for shard in SHARDS for group in shard for user in group}

    def tokens(view: list[tuple[str, int | None]]) -> Counter[int]:
        return Counter(token for item, _ in view for token in item_tokens(item))

    documents = [tokens(view) for user in users.values() if user.split == "train" for view in user.histories.values()]

    def weights(view: list[tuple[str, int | None]]) -> dict[int, float]:
        idf = {
            token: math.log((1 + len(documents)) / (1 + sum(token in document for document in documents))) + 1
            for token in tokens(view)
        }
        raw = {token: (1 + math.log(count)) * idf[token] for token, count in tokens(view).items()}
        norm = math.sqrt(sum(weight**2 for weight in raw.values()))
        return {token: weight / norm for token, weight in raw.items()}

    expected = [
        [
            sum(weight * weights(users[other].histories[1]).get(token, 0) for token, weight in own.items())
            for other in pool.user_ids()
        ]
        for own in (weights(users[one].histories[0]) for one in pool.user_ids())
    ]
    actual = tfidf_scores(pool, tmp_path, shards, VOCAB, num_histories=100)
    assert actual == pytest.approx(np.array(expected), rel=1e-12)
