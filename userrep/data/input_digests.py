"""A digest per user of exactly what an encoder reads of the user: equal digests, equal vectors.

Legend: `N` users, `U` items of a row group, `E` events, `L` places of a left-padded history.

References into an item dictionary are local to a row group, so what counts is the content that they lead to: an item is
the sequence of its tokens, a history the sequence of its items, a user the sequence of histories. Times, values, labels
and ids of users are not read by an encoder and not in a digest.
"""

import numpy as np

from userrep.data.batch import gather_ranges
from userrep.data.split import mix
from userrep.data.views import RowGroup

DIGEST_VERSION = 1  # other digests of the same users: another version


def input_digests(
    group: RowGroup, max_events: int, *, by_id: bool = False, recent_NL: np.ndarray | None = None
) -> np.ndarray:
    """Digests of users, uint64 (N,), whatever shard, row group or dictionary they are in.

    Two different inputs of one user have the same digest with a chance of 2^-64.

    Args:
        group: the users.
        max_events: most recent events of each history that the encoder reads.
        by_id: the encoder knows items by their id; else it reads their tokens.
        recent_NL: what the tasks of a taught encoder read besides, 1 + reference and 0 for no item, (N, L).
    """
    items_U = group.item_keys if by_id else sequence_digests(group.tokens, group.token_offsets)
    kept = np.minimum(np.diff(group.history_offsets), max_events)
    positions, offsets = gather_ranges(group.history_offsets[1:] - kept, kept)
    histories = sequence_digests(items_U[group.items[positions]], offsets)
    users_N = sequence_digests(histories, group.user_offsets)
    if recent_NL is None:
        return users_N
    of_item = np.concatenate([np.zeros(1, dtype=np.uint64), items_U])
    borders = np.arange(len(recent_NL) + 1) * recent_NL.shape[1]
    recent_N = sequence_digests(of_item[recent_NL].ravel(), borders)
    return sequence_digests(np.stack([users_N, recent_N], axis=1).ravel(), np.arange(len(users_N) + 1) * 2)


def sequence_digests(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Digests of ragged sequences of integers, order and length included, uint64 (len(offsets) - 1,).

    Args:
        values: of all sequences, one after another, integers of at most 64 bits.
        offsets: borders of the sequences in `values`; none is empty.
    """
    lengths = np.diff(offsets)
    if not len(lengths):
        return np.zeros(0, dtype=np.uint64)
    of_place = mix(np.arange(int(lengths.max()), dtype=np.uint64), 0)
    places = np.arange(int(offsets[-1] - offsets[0])) - np.repeat(offsets[:-1] - offsets[0], lengths)
    terms = mix(values[offsets[0] : offsets[-1]].astype(np.uint64) ^ of_place[places], 1)
    sums = np.add.reduceat(terms, offsets[:-1] - offsets[0])  # modulo 2^64
    return mix(sums + lengths.astype(np.uint64), 2)
