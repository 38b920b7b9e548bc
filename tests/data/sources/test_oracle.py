import numpy as np
import pytest

from tests.data.sources.reading import read_tables
from userrep.data.sources.oracle import History, oracle_log_likelihood, oracle_scores, user_interests
from userrep.data.sources.synthetic import DAY_S, START_TIME, SyntheticSource
from userrep.data.sources.world import CHUNK_USERS, SERVICES, build_world


def histories_of(source: SyntheticSource, service: str, count: int) -> tuple[list[str], list[History]]:
    events, _ = read_tables(source, "events")
    ids = [f"user-{number:07d}" for number in range(count)]
    found = {user_id: History([], []) for user_id in ids}
    columns = (events[name].to_pylist() for name in ("user_id", "service", "item_id", "time"))
    for user_id, name, item_id, time in zip(*columns, strict=True):
        if name == service and user_id in found:
            found[user_id].item_ids.append(item_id)  # pyright: ignore[reportAttributeAccessIssue]
            found[user_id].times.append(time)  # pyright: ignore[reportAttributeAccessIssue]
    return ids, list(found.values())


def recall(scores: np.ndarray, k: int) -> float:
    """Share of queries whose own candidate (of the same index) is among the best k."""
    return float(np.mean((scores > np.diag(scores)[:, None]).sum(axis=1) < k))


def test_likelihood_is_that_of_the_softmax_over_all_items():
    """Against loops over events and items, of both services, users of two chunks."""
    source = SyntheticSource(num_users=CHUNK_USERS + 2, num_items=30, num_topics=5, events_per_user=4)
    world = build_world(source)
    ids = ["user-0000003", f"user-{CHUNK_USERS + 1:07d}"]
    period_s = source.period_days * DAY_S
    histories = [
        History(
            ["shop-0000004", "search-0000029", "shop-0000004"],
            [START_TIME, START_TIME + 5 * period_s, START_TIME + period_s],
        ),
        History(["shop-0000000"], [START_TIME + 12 * period_s - 1]),
        History([], []),
    ]
    interests = [world.interests(0)[3], world.interests(1)[1]]
    assert np.array_equal(user_interests(source, ids), np.stack(interests))
    topics = world.topics_of(np.arange(30))
    expected = np.zeros((2, 3))
    for query in range(2):
        for candidate, history in enumerate(histories):
            for item_id, time in zip(*history, strict=True):
                name, digits = item_id.split("-")
                z = interests[query][(time - START_TIME) // period_s]
                weights = []
                for item in range(30):
                    rank = item - int(world.topic_starts[topics[item]]) + 1
                    ranks = range(1, int(np.sum(topics == topics[item])) + 1)
                    log_popularity = world.topic_log_weights[SERVICES.index(name), topics[item]]
                    log_popularity += np.log(1 / rank / sum(1 / r for r in ranks))
                    weights.append(np.exp(source.sharpness * z @ world.topic_vectors[:, topics[item]] + log_popularity))
                expected[query, candidate] += np.log(weights[int(digits)] / sum(weights))
    assert oracle_log_likelihood(source, ids, histories) == pytest.approx(expected, rel=1e-9)


def test_scores_subtract_the_mean_likelihood():
    source = SyntheticSource(num_users=30, num_items=50, num_topics=8, events_per_user=6)
    ids, histories = histories_of(source, "shop", 30)
    likelihood = oracle_log_likelihood(source, ids, histories)
    expected = likelihood - np.log(np.exp(likelihood).mean(axis=0))
    assert oracle_scores(source, ids, histories) == pytest.approx(expected, abs=1e-9)


def test_oracle_is_far_above_chance_and_below_certainty_and_above_other_scores():
    source = SyntheticSource(num_users=1000)
    ids, shop = histories_of(source, "shop", 1000)
    _, search = histories_of(source, "search", 1000)
    best = recall(oracle_scores(source, ids, shop), 10)
    assert 0.6 < best < 0.95  # chance: .01
    # A score of the two histories alone: cosine of their mean topic vectors.
    world = build_world(source)
    views = []
    for histories in (search, shop):
        topics = [world.topics_of(np.array([int(id_[-7:]) for id_ in history.item_ids])) for history in histories]
        view = np.stack([world.topic_vectors[:, mine].mean(axis=1) for mine in topics])
        view -= view.mean(axis=0)
        views.append(view / np.linalg.norm(view, axis=1, keepdims=True))
    achieved = recall(views[0] @ views[1].T, 10)
    assert 0.2 < achieved < best  # learnable: twenty times chance without any learning
    # The likelihood without the marginal is no better.
    assert recall(oracle_log_likelihood(source, ids, shop), 10) <= best + 0.01


def test_drift_matters():
    """Interests of the right time explain late events better than interests of the beginning do."""
    source = SyntheticSource(num_users=200)
    ids, shop = histories_of(source, "shop", 200)
    period_s = source.period_days * DAY_S
    late = [
        History(*zip(*[(i, t) for i, t in zip(*history, strict=True) if t >= START_TIME + 10 * period_s], strict=True))
        if max(history.times) >= START_TIME + 10 * period_s
        else History([], [])
        for history in shop
    ]
    early = [History(history.item_ids, [time - 10 * period_s for time in history.times]) for history in late]
    right = np.trace(oracle_log_likelihood(source, ids, late))
    wrong = np.trace(oracle_log_likelihood(source, ids, early))
    num_events = sum(len(history.item_ids) for history in late)
    assert (right - wrong) / num_events > 0.1  # nats per event


@pytest.mark.parametrize(
    ("user_id", "item_id", "time"),
    [
        ("user-0000100", "shop-0000000", START_TIME),
        ("u1", "shop-0000000", START_TIME),
        ("user-0000000", "shop-0000050", START_TIME),
        ("user-0000000", "rent-0000000", START_TIME),
        ("user-0000000", "shop", START_TIME),
        ("user-0000000", "shop-0000000", START_TIME - 1),
    ],
)
def test_foreign_ids_and_times_are_errors(user_id: str, item_id: str, time: int):
    source = SyntheticSource(num_users=100, num_items=50, num_topics=8)
    with pytest.raises(ValueError, match=r"of this source|histories hold"):
        oracle_log_likelihood(source, [user_id], [History([item_id], [time])])
