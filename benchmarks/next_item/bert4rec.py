"""BERT4Rec: attention in both directions over item ids, trained to fill masked places (Cloze).

Source: Sun et al., arXiv 1904.06690. Differs: a share of the sequences has its last item alone masked, drawn anew every
epoch, where the official code adds copies of this kind; norms before the blocks; Xavier in place of std 0.02.

Legend: `B` sequences, `L` places, `D` width, `I` items, `M` masked places.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, Settings, System
from benchmarks.next_item.training import GRID, MAX_ITEMS, SequenceModel, fit
from benchmarks.next_item.transformer import SequenceTransformer, at_last_item, init_weights

MASKED_SHARE = 0.4  # of the places; the paper's best for Steam, whose sequences are about as short
LAST_ALONE = 0.2  # of the sequences: what is asked in the end


class Bert4Rec(SequenceModel):
    """Args: number of items I, width, dropout."""

    def __init__(self, num_items: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.mask_item = 1 + num_items
        self.item = nn.Embedding(2 + num_items, dim, padding_idx=0)
        self.transformer = SequenceTransformer(dim, 1 + MAX_ITEMS, 4, dropout, is_causal=False)
        self.head, self.head_norm = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.bias_I = nn.Parameter(torch.zeros(num_items))
        init_weights(self)

    def loss(self, items_BL: Tensor) -> Tensor:
        """Mean cross-entropy of the items at masked places, of which every sequence has at least one."""
        is_masked_BL = draw_masks(items_BL)
        hidden_BLD = self.transformer(self.item(items_BL.masked_fill(is_masked_BL, self.mask_item)), items_BL)
        return F.cross_entropy(self._logits(hidden_BLD[is_masked_BL]), items_BL[is_masked_BL] - 1)

    def scores(self, items_BL: Tensor) -> Tensor:
        """Score of every item as the next one, (B, I): what fills a masked place behind the sequence."""
        asked_BL = F.pad(items_BL, (0, 1))
        asked_BL[torch.arange(len(items_BL)), (items_BL > 0).sum(dim=1)] = self.mask_item
        return self._logits(at_last_item(self.transformer(self.item(asked_BL), asked_BL), asked_BL))

    def _logits(self, hidden_MD: Tensor) -> Tensor:
        return self.head_norm(F.gelu(self.head(hidden_MD))) @ self.item.weight[1:-1].T + self.bias_I


def draw_masks(items_BL: Tensor) -> Tensor:
    """Places to mask, bool (B, L): at least one of every sequence, none behind its end.

    The last item alone with probability `LAST_ALONE`, else every place with probability `MASKED_SHARE`.
    """
    is_item_BL = items_BL > 0
    length_B1 = is_item_BL.sum(dim=1, keepdim=True)
    place_L = torch.arange(items_BL.shape[1])
    drawn_BL = (torch.rand(items_BL.shape) < MASKED_SHARE) & is_item_BL
    # Where none was drawn, one is, all with the same probability.
    any_B1 = (torch.rand(len(items_BL), 1) * length_B1).long()
    drawn_BL = drawn_BL | ((place_L == any_B1) & ~drawn_BL.any(dim=1, keepdim=True))
    is_last_alone_B1 = torch.rand(len(items_BL), 1) < LAST_ALONE
    return torch.where(is_last_alone_B1, place_L == length_B1 - 1, drawn_BL)


def _run(data: DataSet, settings: Settings, seed: int) -> Outcome:
    make = lambda: Bert4Rec(data.split.num_items, settings["dim"], settings["dropout"])  # noqa: E731
    return fit(make, data, settings["learning_rate"], seed)


BERT4REC = System(GRID, _run)
