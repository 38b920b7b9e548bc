"""SASRec: causal self-attention over item ids, trained on the next item at every place.

Source: Kang and McAuley, arXiv 1808.09781. Differs: cross-entropy over all items in place of binary cross-entropy with
one sampled negative, by which SASRec is known to be much stronger (Klenitskiy and Vasilev, arXiv 2309.07602); GELU;
norms before the blocks.

Legend: `B` sequences, `L` places, `D` width, `I` items, `M` places with a next item.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, Settings, System
from benchmarks.next_item.training import GRID, MAX_ITEMS, SequenceModel, fit
from benchmarks.next_item.transformer import SequenceTransformer, at_last_item, init_weights


class SasRec(SequenceModel):
    """Args: number of items I, width, dropout."""

    def __init__(self, num_items: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.item = nn.Embedding(1 + num_items, dim, padding_idx=0)
        self.transformer = SequenceTransformer(dim, MAX_ITEMS, 1, dropout, is_causal=True)
        init_weights(self)

    def loss(self, items_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the next item over all places that have one."""
        input_BL, target_BL = items_BL[:, :-1], items_BL[:, 1:]
        is_asked_BL = target_BL > 0
        hidden_MD = self.transformer(self.item(input_BL), input_BL.where(is_asked_BL, 0))[is_asked_BL]
        return F.cross_entropy(hidden_MD @ self.item.weight[1:].T, target_BL[is_asked_BL] - 1)

    def scores(self, items_BL: Tensor) -> Tensor:
        """Score of every item as the next one, (B, I)."""
        return at_last_item(self.transformer(self.item(items_BL), items_BL), items_BL) @ self.item.weight[1:].T


def _run(data: DataSet, settings: Settings, seed: int) -> Outcome:
    make = lambda: SasRec(data.split.num_items, settings["dim"], settings["dropout"])  # noqa: E731
    return fit(make, data, settings["learning_rate"], seed)


SASREC = System(GRID, _run)
