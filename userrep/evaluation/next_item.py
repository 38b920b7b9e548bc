"""The question which item comes next, with answers that no encoder has a hand in: TF-IDF vectors of the items' tokens.

Legend: `N` users, `U` items, `C` candidates, `K` width of a candidate's vector.
"""

from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfTransformer

from userrep.data.batch import HistoryBatch
from userrep.data.probe_users import ProbeUsers
from userrep.evaluation.baselines import token_counts

CANDIDATE_DIM = 64
NEXT_ITEM_CUTOFF = 10  # recall at so many
NEXT_ITEM = "next_item"


@dataclass(frozen=True)
class NextItem:
    """The last item of users who did something before it.

    Attributes:
        users: positions of these users, ascending (N,).
        labels: candidate that is each one's last item, int64 (N,).
        vectors: of all candidates, which are the last items of all these users, each once; float32 (C, K), L2 norm 1.
    """

    users: np.ndarray
    labels: np.ndarray
    vectors: np.ndarray


def next_item(users: ProbeUsers, seed: int = 0) -> NextItem:
    """The question for all probe users, training and held-out ones.

    Document frequencies and the truncated singular value decomposition are of all items of the users. No item counts
    more for being frequent.

    Args:
        users: of the probe.
        seed: of the decomposition.

    Raises:
        ValueError: fewer than two items come last.
    """
    asked = np.flatnonzero(users.has_before)
    candidates, labels = np.unique(users.group.items[users.targets[asked]], return_inverse=True)
    if len(candidates) < 2:
        raise ValueError(
            f"{len(asked)} users with at least two events have {len(candidates)} last items, and the next item is "
            "chosen among at least 2: probe more users, or leave next_item out"
        )
    return NextItem(asked, labels, _item_vectors(users.group.tokens, users.group.token_offsets, seed)[candidates])


def _item_vectors(tokens: np.ndarray, token_offsets: np.ndarray, seed: int) -> np.ndarray:
    """Float32 (U, K), L2 norm 1; K is `CANDIDATE_DIM`, or less where items or their tokens are fewer."""
    num_items = len(token_offsets) - 1
    used, numbers = np.unique(tokens, return_inverse=True)
    each = HistoryBatch(numbers, token_offsets, np.arange(num_items), np.arange(num_items + 1), np.arange(num_items))
    counts = token_counts(each, len(used))
    weights = TfidfTransformer(sublinear_tf=True).fit_transform(counts)
    dim = min(CANDIDATE_DIM, num_items, len(used))
    vectors = TruncatedSVD(dim, random_state=seed).fit_transform(weights)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)
