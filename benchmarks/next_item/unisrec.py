"""Text-only UniSRec: frozen text vectors of the items, whitened, adapted, and read by causal self-attention.

Source: Hou et al., arXiv 2206.05941, on item texts alone, without item ids. Differs: the text vectors are
truncated SVD (256) of TF-IDF, since no pretrained language model may be downloaded; whitening is computed (each
component to mean 0 and variance 1) and one linear adaptor takes the place of its mixture of experts; nothing is
pretrained on other domains.

Legend: `B` sequences, `L` places, `D` width, `I` items, `K` width of a text vector, `M` places with a next item.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.decomposition import TruncatedSVD
from torch import Tensor, nn

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, Settings, System
from benchmarks.next_item.tf_idf import item_tf_idf
from benchmarks.next_item.training import GRID, MAX_ITEMS, SequenceModel, fit
from benchmarks.next_item.transformer import SequenceTransformer, at_last_item, init_weights

TEXT_DIM = 256
TEMPERATURE = 0.07  # of the official code (RUCAIBox/UniSRec)


class UniSRec(SequenceModel):
    """Args: text vectors of all items, float32 (I, K); width, dropout."""

    text_vectors: Tensor

    def __init__(self, text_IK: Tensor, dim: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("text_vectors", text_IK, persistent=False)
        self.adaptor = nn.Linear(text_IK.shape[1], dim)
        self.transformer = SequenceTransformer(dim, MAX_ITEMS, 1, dropout, is_causal=True)
        self.dropout = dropout
        init_weights(self)

    def loss(self, items_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the next item over all places that have one."""
        input_BL, target_BL = items_BL[:, :-1], items_BL[:, 1:]
        is_asked_BL, item_ID = target_BL > 0, self._items()
        hidden_MD = self._hidden(input_BL.where(is_asked_BL, 0), item_ID)[is_asked_BL]
        return F.cross_entropy(_cosines(hidden_MD, item_ID) / TEMPERATURE, target_BL[is_asked_BL] - 1)

    def scores(self, items_BL: Tensor) -> Tensor:
        """Cosine of every item as the next one, (B, I)."""
        item_ID = self._items()
        return _cosines(at_last_item(self._hidden(items_BL, item_ID), items_BL), item_ID)

    def _hidden(self, items_BL: Tensor, item_ID: Tensor) -> Tensor:
        return self.transformer(F.embedding(items_BL, F.pad(item_ID, (0, 0, 1, 0))), items_BL)

    def _items(self) -> Tensor:
        return F.dropout(self.adaptor(self.text_vectors), self.dropout, self.training)


def text_vectors(texts: list[str], dim: int = TEXT_DIM) -> np.ndarray:
    """Whitened truncated SVD of the texts' TF-IDF, float32 (I, K); K is `dim`, or less where there are fewer terms."""
    weights = item_tf_idf(texts, 1)
    vectors = TruncatedSVD(min(dim, len(texts), weights.indices.max() + 1), random_state=0).fit_transform(weights)
    vectors -= vectors.mean(axis=0)
    return (vectors / np.maximum(vectors.std(axis=0), 1e-6)).astype(np.float32)


def _cosines(hidden_MD: Tensor, item_ID: Tensor) -> Tensor:
    return F.normalize(hidden_MD, dim=-1) @ F.normalize(item_ID, dim=-1).T


def _run(data: DataSet, settings: Settings, seed: int) -> Outcome:
    text_IK = torch.from_numpy(text_vectors(data.texts))
    make = lambda: UniSRec(text_IK, settings["dim"], settings["dropout"])  # noqa: E731
    return fit(make, data, settings["learning_rate"], seed)


UNISREC = System(GRID, _run)
