"""Quality of a table user by user, beside its parts: what lets a later version be compared on the same users.

Needs pyarrow only (no numpy, no torch).
"""

import hashlib
from collections.abc import Mapping, Sequence

import pyarrow as pa

QUALITY_NAME = "quality.parquet"
KEY_COLUMN = "key"


def quality_rows(ids: Sequence[str], values: Mapping[str, Sequence[float]]) -> pa.Table:
    """One row for each measured user: `key`, and a column for each metric.

    Args:
        ids: of the users.
        values: of each metric, one number a user; keys are those of the metrics of the version, e.g.
            `test/recall_at_10`.

    Raises:
        ValueError: a metric has more or fewer values than there are users.
    """
    for metric, column in values.items():
        if len(column) != len(ids):
            raise ValueError(f"metric {metric!r} has {len(column)} values of {len(ids)} users: give one for each")
    keys = pa.array([user_key(one) for one in ids], pa.int64())
    return pa.table({KEY_COLUMN: keys, **{metric: pa.array(column, pa.float32()) for metric, column in values.items()}})


def user_key(user_id: str) -> int:
    """What tells users apart without naming them: the first 8 bytes of the sha256 of the id, as an int64."""
    return int.from_bytes(hashlib.sha256(user_id.encode()).digest()[:8], signed=True)
