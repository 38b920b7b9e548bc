"""Random users as they are ingested: several services, labels, and times of all kinds."""

import numpy as np

from tests.support.tokenized import Event, Group, User
from userrep.data.split import SPLITS

SERVICES = ["view", "buy", "rate"]


def draw_user(rng: np.random.Generator, number: int) -> User:
    """Repeated items; times that are equal, unknown, or before 1970. The first users have all that can be asked."""
    is_full = number < 6
    histories: dict[int, list[Event]] = {}
    for service in range(3):
        length = int(rng.integers(4, 7)) if is_full else int(rng.integers(0, 5) * rng.integers(0, 2))
        times = sorted(rng.integers(-3, 4, length).tolist())
        num_unknown = int(rng.integers(0, length + 1) * rng.integers(0, 2))
        items = [f"i{n}" for n in rng.integers(0, 9, length)]
        if length:
            histories[service] = [(name, None if n < num_unknown else times[n]) for n, name in enumerate(items)]
    labels = {"gender": "FM"[number % 2], "age": f"{rng.integers(2, 5)}0s"}
    kept = tuple((name, value) for name, value in labels.items() if is_full or rng.random() < 0.7)
    return User(f"user {number}", SPLITS[number % 3], histories or {0: [("i0", None)]}, kept)


def draw_shards(seed: int, num_users: int = 40) -> list[list[Group]]:
    """Row groups of uneven sizes over three shards, one of them without any."""
    rng = np.random.default_rng(seed)
    users = [draw_user(rng, number) for number in range(num_users)]
    borders = [0, *sorted(rng.choice(np.arange(1, num_users), 4, replace=False).tolist()), num_users]
    groups = [users[start:stop] for start, stop in zip(borders, borders[1:], strict=False)]
    return [groups[:2], [], groups[2:]]
