"""A fine-tuned, or merely pretrained, Recformer asked for the next item among all items.

Legend: `A` asked users, `I` items of the catalogue, `D` width.
"""

import numpy as np
import torch

from userrep.data.leave_one_out import Held
from userrep.data.next_item_samples import SequenceReader
from userrep.evaluation.next_item_ranking import rank_next_items
from userrep.models.recformer import Recformer
from userrep.training.recformer_encoding import encode_sequences

SEQUENCES_AT_ONCE = 512  # whose token embeddings are in memory


def encode_items(model: Recformer, reader: SequenceReader) -> torch.Tensor:
    """The item matrix: vectors of all items of the catalogue without graph, (I, D), L2 norm 1."""
    num_items = reader.data.num_items
    starts = range(0, num_items, SEQUENCES_AT_ONCE)
    parts = (reader.items(start, min(start + SEQUENCES_AT_ONCE, num_items)) for start in starts)
    return torch.cat([encode_sequences(model, part) for part in parts])


def evaluate(model: Recformer, item_ID: torch.Tensor, reader: SequenceReader, held: Held) -> dict[str, np.ndarray]:
    """Every asked user's NDCG at 10, recall at 10 and reciprocal rank, float64 (A,), by the names of `METRICS`.

    Args:
        model: encodes the histories.
        item_ID: the item matrix; an item's score is its product with the history's vector.
        reader: of users and catalogue.
        held: which event is asked for.
    """
    histories = reader.data.histories(held)

    def scores(start: int, stop: int) -> np.ndarray:
        user_UD = encode_sequences(model, reader.histories(histories.take(np.arange(start, stop))))
        return (user_UD @ item_ID.T).cpu().numpy()

    return rank_next_items(scores, reader.data.targets(held), SEQUENCES_AT_ONCE).values()
