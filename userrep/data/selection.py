"""Some users of a row group, as a row group of their own."""

import numpy as np
import pyarrow as pa

from userrep.data.batch import compact, gather_ranges
from userrep.data.views import RowGroup


def select_users(group: RowGroup, users: np.ndarray, max_events: int | None = None) -> RowGroup:
    """The users at some places, in that order, over the items that they have.

    Args:
        group: where they are.
        users: places, (M,).
        max_events: most recent events of each history that are kept; None: all.
    """
    histories, user_offsets = gather_ranges(group.user_offsets[users], np.diff(group.user_offsets)[users])
    stops, lengths = group.history_offsets[histories + 1], np.diff(group.history_offsets)[histories]
    if max_events is not None:
        lengths = np.minimum(lengths, max_events)
    events, history_offsets = gather_ranges(stops - lengths, lengths)
    items, tokens, token_offsets, used = compact(group.items[events], group.tokens, group.token_offsets)
    return RowGroup(
        user_ids=group.user_ids.take(pa.array(users)),
        keys=group.keys[users],
        splits=group.splits[users],
        user_offsets=user_offsets,
        services=group.services[histories],
        history_offsets=history_offsets,
        items=items,
        times=group.times.take(pa.array(events)),
        item_ids=group.item_ids.take(pa.array(used)),
        tokens=tokens,
        token_offsets=token_offsets,
    )
