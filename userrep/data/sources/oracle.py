"""What can at best be known about synthetic users: exact likelihoods under their true interests.

The retrieval task: given user q's history in one service (A_q), find among candidates the history B_q of the same
user in the other. A_q and B_q share nothing but the interests z_q, so A_q tells no more about B_q than z_q does. For a
scorer that looks at one pair at a time, the most powerful score given z_q is the likelihood ratio p(B_c | z_q) / p(B_c)
(Neyman and Pearson: at every rate of false positives, no score lets through more true ones), and recall@k only grows
with that power. `oracle_scores` is its logarithm, with p(B_c) estimated by the mean over the query users. It is thus an
upper bound, up to that estimate and the chance of a finite pool, on the expected recall of any score of a pair
(A_q, B_c), learned or not. (A matching of all pairs at once could use that each candidate belongs to one user.)
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from userrep.data.sources.synthetic import DAY_S, START_TIME, SyntheticSource
from userrep.data.sources.world import CHUNK_USERS, SERVICES, World, build_world


class History(NamedTuple):
    """Events of one user, of one service or of both."""

    item_ids: Sequence[str]
    times: Sequence[int]  # unix seconds, one per item


def oracle_log_likelihood(source: SyntheticSource, user_ids: Sequence[str], histories: Sequence[History]) -> np.ndarray:
    """log p(items of each history | interests of each user at its times), float64 (Q, P).

    Args:
        source: the source that the ids come from.
        user_ids: the Q users whose interests are recomputed.
        histories: the P histories, each with at least one event for a score to mean anything.

    Raises:
        ValueError: an id or time that this source does not produce.
    """
    world = build_world(source)
    interests = _interests(source, world, user_ids)
    log_probs = [world.topic_log_probs(interests, service) for service in range(len(SERVICES))]
    log_probs = np.stack(log_probs, axis=1).reshape(len(user_ids), -1)  # (Q, S * K * T)
    counts, log_shares = _summaries(source, world, histories)
    return log_probs @ counts.T + log_shares


def oracle_scores(
    source: SyntheticSource, query_user_ids: Sequence[str], candidate_histories: Sequence[History]
) -> np.ndarray:
    """log p(B_c | z_q) - log mean_u p(B_c | z_u) over the query users u, float64 (Q, P). Optimal: see the module.

    The mean stands for the marginal p(B_c), so the query users should be a sample of the population of useful size.
    """
    likelihood = oracle_log_likelihood(source, query_user_ids, candidate_histories)
    top = likelihood.max(axis=0)
    return likelihood - top - np.log(np.exp(likelihood - top).mean(axis=0))


def user_interests(source: SyntheticSource, user_ids: Sequence[str]) -> np.ndarray:
    """The true interests of users in each period, float64 (Q, num_periods, interest_dim).

    Raises:
        ValueError: an id that this source does not produce.
    """
    return _interests(source, build_world(source), user_ids)


def _interests(source: SyntheticSource, world: World, user_ids: Sequence[str]) -> np.ndarray:
    numbers = np.array([_number(user_id, "user", source.num_users) for user_id in user_ids], np.int64)
    found = np.empty((len(numbers), source.num_periods, source.interest_dim))
    for chunk in np.unique(numbers // CHUNK_USERS):
        mine = numbers // CHUNK_USERS == chunk
        found[mine] = world.interests(int(chunk))[numbers[mine] % CHUNK_USERS]
    return found


def _summaries(source: SyntheticSource, world: World, histories: Sequence[History]) -> tuple[np.ndarray, np.ndarray]:
    """Events per (service, period, topic), (P, S * K * T), and the part of log p that no user changes, (P,)."""
    services = {name: index for index, name in enumerate(SERVICES)}
    owner = np.repeat(np.arange(len(histories)), [len(history.item_ids) for history in histories])
    ids = [item_id for history in histories for item_id in history.item_ids]
    seconds = np.array([time for history in histories for time in history.times], np.int64) - START_TIME
    if len(seconds) != len(ids):
        raise ValueError(f"histories hold {len(ids)} items but {len(seconds)} times: give one time per item")
    prefixes = [item_id.partition("-")[0] for item_id in ids]
    items = np.array([_number(id_, name, source.num_items) for id_, name in zip(ids, prefixes, strict=True)], np.int64)
    unknown = sorted(set(prefixes) - set(services))
    period = seconds // (source.period_days * DAY_S)
    if unknown or not ((period >= 0) & (period < source.num_periods)).all():
        problem = f"items of {unknown}" if unknown else "times outside the periods of the source"
        raise ValueError(
            f"histories hold {problem}: give items of {list(services)} and times as this source yields them"
        )
    service = np.array([services[name] for name in prefixes], np.int64)
    cell = (service * source.num_periods + period) * source.num_topics + world.topics_of(items)
    counts = np.zeros((len(histories), len(SERVICES) * source.num_periods * source.num_topics))
    np.add.at(counts, (owner, cell), 1)
    log_shares = np.bincount(owner, world.item_log_shares(items), minlength=len(histories))
    return counts, log_shares


def _number(id_: str, prefix: str, count: int) -> int:
    name, _, digits = id_.partition("-")
    if name != prefix or not digits.isdecimal() or not 0 <= int(digits) < count:
        raise ValueError(
            f"{id_!r} is no {prefix} id of this source: ids run from {prefix}-0000000 to {prefix}-{count - 1:07d}"
        )
    return int(digits)
