"""Cosine between an item's TF-IDF vector and the mean of those of the history's last items. Nothing is trained.

The catalogue's texts give the document frequencies. Words and, where the settings say so, pairs of them; term
frequencies are logarithmic.
"""

from itertools import product

import numpy as np
import scipy.sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import normalize

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, Settings, System, rank_both
from userrep.data.leave_one_out import Sequences

TOKEN = r"(?u)\b\w+\b"  # single characters too: sizes and model numbers tell items apart


def item_tf_idf(texts: list[str], max_words: int) -> scipy.sparse.csr_matrix:
    """TF-IDF of every text, L2 norm 1, sparse (I, terms); terms are runs of up to `max_words` words.

    Raises:
        ValueError: no text holds a word.
    """
    vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=TOKEN, ngram_range=(1, max_words))
    return scipy.sparse.csr_matrix(vectorizer.fit_transform(texts), dtype=np.float32)


def mean_rows(vectors: scipy.sparse.csr_matrix, histories: Sequences) -> scipy.sparse.csr_matrix:
    """Sum of the item vectors of each history, scaled to L2 norm 1."""
    members = np.ones(len(histories.items), vectors.dtype), histories.items, histories.offsets
    sums = scipy.sparse.csr_matrix(members, shape=(len(histories), len(vectors.indptr) - 1)) @ vectors
    return scipy.sparse.csr_matrix(normalize(sums))


def _run(data: DataSet, settings: Settings, seed: int) -> Outcome:
    vectors = item_tf_idf(data.texts, settings["max_words"])
    return rank_both(
        data, lambda histories: (mean_rows(vectors, histories.recent(settings["max_items"])) @ vectors.T).toarray()
    )


TF_IDF = System(
    grid=tuple({"max_words": words, "max_items": items} for words, items in product((1, 2), (1, 2, 3, 5, 20))),
    run=_run,
    is_seeded=False,
)
