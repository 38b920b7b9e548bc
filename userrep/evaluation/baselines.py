"""What one would use without a trained encoder: random, popularity, TF-IDF. Scores over a pool, as in `ranking.py`.

Legend: `P` users of the pool, `V` vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfTransformer

from userrep.data.batch import HistoryBatch, gather_ranges
from userrep.data.key_values import KEY_FLAG
from userrep.data.pool import Pool
from userrep.data.split import SPLITS
from userrep.data.views import RowGroup, all_histories, latest_events, manifest_row_groups, read_row_group


def random_scores(num_users: int, seed: int = 0) -> np.ndarray:
    """Independent uniform scores (P, P)."""
    return np.random.default_rng(seed).random((num_users, num_users))


def popularity_scores(pool: Pool, directory: Path, shards: list[dict[str, Any]]) -> np.ndarray:
    """Mean log popularity of both views' items, (P, P); a row ranks by the candidate alone. Counts training events."""
    order = np.argsort(pool.group.item_keys)
    counts = np.empty(len(order), dtype=np.int64)
    counts[order] = training_counts(pool.group.item_keys[order], directory, shards)
    events = latest_events(pool.samples, pool.max_events)
    sums = np.add.reduceat(np.log1p(counts[pool.group.items[events.positions]]), events.offsets[:-1])
    mean = sums / np.diff(events.offsets)
    anchor_P, positive_P = np.split(mean, 2)
    return anchor_P[:, None] + positive_P[None, :]


def training_counts(keys_N: np.ndarray, directory: Path, shards: list[dict[str, Any]]) -> np.ndarray:
    """Events of each item among training users, int64 (N,).

    Args:
        keys_N: 64-bit keys of the items, uint64, ascending; other items are not counted.
        directory: of the shards.
        shards: shard facts of its manifest.
    """
    counts = np.zeros(len(keys_N), dtype=np.int64)
    for group in _row_groups(directory, shards):
        rows = np.minimum(np.searchsorted(keys_N, group.item_keys), len(keys_N) - 1)
        rows[keys_N[rows] != group.item_keys] = -1
        events_of_user = np.diff(group.history_offsets[group.user_offsets])
        is_train_event = np.repeat(group.splits == SPLITS.index("train"), events_of_user)
        items = rows[group.items[is_train_event]]
        counts += np.bincount(items[items >= 0], minlength=len(counts))
    return counts


def tfidf_scores(
    pool: Pool, directory: Path, shards: list[dict[str, Any]], vocab_size: int, num_histories: int
) -> np.ndarray:
    """Cosine of TF-IDF vectors of the views' tokens, (P, P).

    Document frequencies come from the first `num_histories` histories of training users. Term frequencies are
    logarithmic (1 + log tf), which retrieves better here than raw counts.
    """
    counts, total = [], 0
    for group in _row_groups(directory, shards):
        users = np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets))
        rows = token_counts(all_histories(group, pool.max_events), vocab_size)[
            group.splits[users] == SPLITS.index("train")
        ]
        counts.append(rows)
        total += rows.shape[0]
        if total >= num_histories:
            break
    weights = TfidfTransformer(sublinear_tf=True).fit(scipy.sparse.vstack(counts))
    vectors = weights.transform(token_counts(pool.batch(), vocab_size))
    return (vectors[: len(pool)] @ vectors[len(pool) :].T).toarray()


def token_counts(batch: HistoryBatch, vocab_size: int) -> scipy.sparse.csr_matrix:
    """How often each token occurs in each history, sparse (H, V)."""
    lengths = np.diff(batch.token_offsets)[batch.history_items]
    positions, event_offsets = gather_ranges(batch.token_offsets[:-1][batch.history_items], lengths)
    tokens = batch.tokens[positions] & ~KEY_FLAG
    row_borders = event_offsets[batch.history_offsets]
    shape = (len(batch.history_offsets) - 1, vocab_size)
    matrix = scipy.sparse.csr_matrix((np.ones(len(tokens)), tokens, row_borders), shape=shape)
    matrix.sum_duplicates()
    return matrix


def _row_groups(directory: Path, shards: list[dict[str, Any]]) -> Iterator[RowGroup]:
    for shard, number, _ in manifest_row_groups(shards):
        yield read_row_group(directory, shard, number)
