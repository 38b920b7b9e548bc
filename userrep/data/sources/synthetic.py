"""The built-in data set: made-up users who search and shop. Needs no file; the model is stated in `world`."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from collections.abc import Iterator
from functools import partial
from statistics import NormalDist
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from userrep.data.sources.source import Parsed, Part, TableName
from userrep.data.sources.validate import MAX_BATCH_ROWS
from userrep.data.sources.world import CHUNK_ITEMS, CHUNK_USERS, SERVICES, World, WorldConfig, build_world, generator
from userrep.schema import EVENTS, ITEMS, REJECTED, USERS

START_TIME = 1_704_067_200  # 2024-01-01 00:00 UTC, the first period's begin
DAY_S = 86_400
MAX_PROBABILITIES = 1 << 21  # held at once: 16 MiB, a few times over
MAX_EVENTS_FACTOR = 16  # a history ends at this many times the mean, which bounds the memory of a part
GENDERS = ("F", "M")
AGE_BANDS = ("under 20", "20s", "30s", "40s", "50s", "60+")
LIFE_STAGES = ("single", "couple", "family", "retired")


class SyntheticSource(WorldConfig):
    """Users with events in two services, `search` (queries) and `shop` (products), and three profile labels.

    In each service a user has a lognormal number of events, at least one, at uniform times, drawn from the world's
    softmax. Numbers and times are drawn for each service on its own, so that a user's two histories share nothing but
    the interests. Search events have no value, shop events a quantity. Labels are noisy functions of the interests'
    mean over time.

    Users are drawn in chunks, each from (seed, chunk): more users are more chunks, and the earlier users stay the same.
    """

    kind: Literal["synthetic"] = "synthetic"
    num_users: int = Field(default=20_000, ge=1)
    events_per_user: float = Field(default=24.0, ge=1, le=1000)  # mean, per service; the memory of a part grows with it
    events_spread: float = Field(default=0.5, ge=0, le=2)  # standard deviation of the log of their number
    label_noise: float = Field(default=0.5, ge=0)  # standard deviation, where what a label depends on has 1

    def services(self) -> list[str]:
        """`search` and `shop`."""
        return list(SERVICES)

    def parts(self, table: TableName) -> list[Part]:
        """One part per chunk of items or users."""
        if table == "items":
            chunks = range(-(-self.num_items // CHUNK_ITEMS))
            return [partial(_items, self, service, chunk) for service in range(len(SERVICES)) for chunk in chunks]
        read = _events if table == "events" else _users
        return [partial(read, self, chunk) for chunk in range(-(-self.num_users // CHUNK_USERS))]


def user_ids(numbers: np.ndarray) -> pa.Array:
    """Ids of users by number, e.g. user-0000012."""
    return _ids("user-", numbers)


def item_ids(services: np.ndarray, numbers: np.ndarray) -> pa.Array:
    """Ids of items by service index and number, e.g. shop-0000012."""
    return _ids(pa.array([f"{name}-" for name in SERVICES]).take(pa.array(services)), numbers)


def _ids(prefix: str | pa.Array, numbers: np.ndarray) -> pa.Array:
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 7, "0")
    return pc.binary_join_element_wise(prefix, digits, "")


def _items(source: SyntheticSource, service: int, chunk: int) -> Iterator[Parsed]:
    texts = build_world(source).item_texts(service, chunk)
    numbers = np.arange(chunk * CHUNK_ITEMS, chunk * CHUNK_ITEMS + len(texts))
    ids = item_ids(np.full(len(texts), service), numbers)
    yield from _parsed(ITEMS, [ids, pa.array(texts, pa.string())], f"synthetic/items/{SERVICES[service]}/{chunk}")


def _users(source: SyntheticSource, chunk: int) -> Iterator[Parsed]:
    world, count = build_world(source), _chunk_size(source, chunk)
    traits = standard_traits(world, world.interests(chunk))
    noise = source.label_noise * generator(source.seed, "labels", chunk).standard_normal(traits.shape)
    noisy = ((traits + noise) / np.sqrt(1 + source.label_noise**2))[:count]
    thresholds = [NormalDist().inv_cdf(band / len(AGE_BANDS)) for band in range(1, len(AGE_BANDS))]
    values = np.stack(
        [
            np.array(GENDERS, object)[(noisy[:, 0] > 0).astype(int)],
            np.array(AGE_BANDS, object)[np.searchsorted(thresholds, noisy[:, 1])],
            np.array(LIFE_STAGES, object)[noisy[:, 2:].argmax(axis=1)],
        ],
        axis=1,
    )
    names = pa.array(["gender", "age_band", "life_stage"] * count, pa.string())
    offsets = pa.array(np.arange(0, 3 * count + 1, 3, dtype=np.int32))
    labels = pa.MapArray.from_arrays(offsets, names, pa.array(values.ravel(), pa.string()))
    ids = user_ids(np.arange(chunk * CHUNK_USERS, chunk * CHUNK_USERS + count))
    yield from _parsed(USERS, [ids, labels], f"synthetic/users/{chunk}")


def standard_traits(world: World, interests: np.ndarray) -> np.ndarray:
    """What labels depend on: the users' mean interests (U, K, D) along the label directions, (U, 6), each N(0, 1)."""
    periods = np.arange(world.config.num_periods)
    kept = 1 - world.config.drift
    # 0 ** 0 is 1, so a drift of 1 (independent periods) comes out right.
    variance = (float(kept) ** np.abs(periods[:, None] - periods)).mean()
    return interests.mean(axis=1) @ world.label_directions / np.sqrt(variance)


def _events(source: SyntheticSource, chunk: int) -> Iterator[Parsed]:
    world = build_world(source)
    owner, time = _draw_times(source, chunk)  # owner: user * S + service
    user, service = np.divmod(owner, len(SERVICES))
    rng = generator(source.seed, "events", chunk)
    uniform = rng.random((2, len(owner)))
    quantity = rng.geometric(0.8, len(owner)).astype(np.float32)
    topics = _draw_topics(world, world.interests(chunk), owner, time // (source.period_days * DAY_S), uniform[0])
    items = world.draw_items(topics, uniform[1])
    history_starts = np.flatnonzero(np.diff(owner, prepend=-1))
    position = np.arange(len(owner)) - history_starts[owner]  # every owner has events
    # A chunk is drawn whole, so that its users do not depend on how many of them are asked for.
    kept = user < _chunk_size(source, chunk)
    columns = [
        user_ids(chunk * CHUNK_USERS + user[kept]),
        item_ids(service[kept], items[kept]),
        pa.array(SERVICES).take(pa.array(service[kept])),
        pa.array(START_TIME + time[kept]),
        pa.array(position[kept]),
        pa.array(quantity[kept], mask=service[kept] == SERVICES.index("search")),
    ]
    yield from _parsed(EVENTS, columns, f"synthetic/events/{chunk}")


def _draw_times(source: SyntheticSource, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Owner and time (seconds from the start) of a chunk's events, sorted by both."""
    rng = generator(source.seed, "counts", chunk)
    mean, spread = source.events_per_user, source.events_spread
    drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, CHUNK_USERS * len(SERVICES))
    counts = np.clip(np.round(drawn), 1, np.ceil(mean * MAX_EVENTS_FACTOR)).astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    horizon = source.num_periods * source.period_days * DAY_S
    # Sorting one number that holds both is several times faster than sorting by two keys.
    return np.divmod(np.sort(owner * horizon + rng.integers(0, horizon, len(owner))), horizon)


def _draw_topics(
    world: World, interests: np.ndarray, owner: np.ndarray, period: np.ndarray, uniform: np.ndarray
) -> np.ndarray:
    """A topic for each event, events sorted by owner, from the interests (U, K, D) and uniform numbers in [0, 1)."""
    topics = np.empty(len(owner), np.int64)
    user, service = np.divmod(owner, len(SERVICES))
    num_periods, num_topics = world.config.num_periods, world.config.num_topics
    # The probabilities of every user, period and topic at once could be gigabytes.
    block = max(1, MAX_PROBABILITIES // (num_periods * num_topics))
    for begin in range(0, len(interests), block):
        low, high = np.searchsorted(user, [begin, begin + block])
        for index in range(len(SERVICES)):
            mine = low + np.flatnonzero(service[low:high] == index)
            log_probs = world.topic_log_probs(interests[begin : begin + block], index)
            rows = (user[mine] - begin) * num_periods + period[mine]
            topics[mine] = _draw_from_rows(np.exp(log_probs).reshape(-1, num_topics), rows, uniform[mine])
    return topics


def _draw_from_rows(probabilities: np.ndarray, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """A column for each entry of `rows` from that row of probabilities (rows, T)."""
    num_topics = probabilities.shape[1]
    # Row r's cumulative sums, raised by r, make one ascending sequence: one search serves all events.
    cumulative = np.cumsum(probabilities, axis=1) + np.arange(len(probabilities))[:, None]
    found = np.searchsorted(cumulative.ravel(), rows + uniform, side="right") - rows * num_topics
    return np.clip(found, 0, num_topics - 1)  # rounding may lead past either end of the row


def _chunk_size(source: SyntheticSource, chunk: int) -> int:
    return min(CHUNK_USERS, source.num_users - chunk * CHUNK_USERS)


def _parsed(schema: pa.Schema, columns: list[pa.Array], name: str) -> Iterator[Parsed]:
    rows = len(columns[0])
    origin = [pa.repeat(pa.scalar(name), rows), pa.array(np.arange(1, rows + 1))]
    table = pa.Table.from_arrays([*columns, *origin], schema=schema)
    for start in range(0, rows, MAX_BATCH_ROWS):
        yield Parsed(table.slice(start, MAX_BATCH_ROWS), REJECTED.empty_table())
