"""What batches of a stream show, as plain lists."""

import itertools

from userrep.data.batch import UserBatch, from_table
from userrep.data.stream import TrainingStream


def histories_of(batch: UserBatch) -> list[list[list[int]]]:
    bounds, items = batch.token_offsets, batch.history_offsets
    dictionary = [batch.tokens[a:b].tolist() for a, b in itertools.pairwise(bounds)]
    return [[dictionary[item] for item in batch.history_items[a:b]] for a, b in itertools.pairwise(items)]


def seen_by(batch: UserBatch) -> list[tuple[int, list[list[int]], list[list[int]]]]:
    """(key, anchor's tokens, positive's tokens) of every user."""
    histories, size = histories_of(batch), len(batch.user_keys)
    return list(zip(batch.user_keys.tolist(), histories[:size], histories[size:], strict=True))


def steps(stream: TrainingStream, world_size: int, start_step: int = 0) -> list[list[UserBatch]]:
    """Batches of all ranks, step by step."""
    found: list[UserBatch] = []
    for window in stream.plan.windows(start_step):
        found += map(from_table, stream.window_batches(window, world_size, start_step))
    return [found[n : n + world_size] for n in range(0, len(found), world_size)]
