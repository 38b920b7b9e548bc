"""Next-item recommendation as token sequences: how items and histories are read, and what is trained on in a pass.

Source: Recformer, Li et al., KDD 2023 (arXiv 2305.13731, section 2.4): one random place of a user's training history is
the target, what is before it is the history. Differs: a history has at least one item (in AaronHeee/RecFormer, the
first item may be the target, of a history without any); a draw is a function of the user, not of its place.

Legend: `N` users, `I` items of the catalogue, `B` samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from userrep.data.batch import HistoryBatch, gather_ranges
from userrep.data.item_sequences import TokenSequences, item_sequences
from userrep.data.leave_one_out import LeaveOneOut, Sequences
from userrep.data.split import id_keys, mix, unit_interval

TARGET, ORDER = 0, 1  # purposes of random numbers


@dataclass(frozen=True)
class SequenceReader:
    """How a model reads what users did.

    Attributes:
        data: users and the catalogue; tokens of keys are flagged.
        cls_id: token that begins every sequence.
        max_items: of a history, the most recent ones, >= 1.
        max_tokens: of a sequence with its [CLS], >= 1.
    """

    data: LeaveOneOut
    cls_id: int
    max_items: int
    max_tokens: int

    def histories(self, histories: Sequences) -> TokenSequences:
        """Token sequences of histories, none of which is empty."""
        data = self.data
        batch = HistoryBatch(data.tokens, data.token_offsets, histories.items, histories.offsets, self._item_keys)
        return item_sequences(batch, self.cls_id, self.max_items, self.max_tokens)

    def items(self, start: int, stop: int) -> TokenSequences:
        """Token sequences of the items with numbers in [start, stop): each is a history of one event."""
        return self.histories(Sequences(np.arange(start, stop, dtype=np.int32), np.arange(stop - start + 1)))

    @cached_property
    def _item_keys(self) -> np.ndarray:
        return id_keys(self.data.item_ids).view(np.int64)


@dataclass(frozen=True)
class NextItemSamples:
    """What is trained on.

    Attributes:
        histories: oldest item first, none empty, B sequences.
        targets: the item that comes next, (B,).
    """

    histories: Sequences
    targets: np.ndarray

    def __len__(self) -> int:
        """Number of samples B."""
        return len(self.targets)

    def batches(self, size: int) -> Iterator["NextItemSamples"]:
        """Consecutive samples, `size` each; the last batch may be smaller."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield NextItemSamples(self.histories.take(np.arange(start, stop)), self.targets[start:stop])


def trainable_users(data: LeaveOneOut, share: float, seed: int) -> np.ndarray:
    """Users of a share who have two training events, so that one comes before another; ascending positions.

    Args:
        data: the users.
        share: as of `LeaveOneOut.train_share`; smaller ones are parts of larger ones.
        seed: which users.

    Raises:
        ValueError: there is no such user, or the share is out of range.
    """
    users = data.train_share(share, seed)
    users = users[data.train.lengths[users] >= 2]
    if not len(users):
        raise ValueError(
            f"of a share of {share} of {len(data)} users, none has two training events, and the next item needs one "
            "before it: take a larger share"
        )
    return users


def draw_samples(data: LeaveOneOut, users: np.ndarray, seed: int, stage: int, number: int) -> NextItemSamples:
    """One random place of each user's training history, users in random order.

    Args:
        data: the users.
        users: from `trainable_users`.
        seed: of the run, >= 0.
        stage: of the run, >= 0.
        number: of the pass over the users in the stage, >= 0.
    """
    key_N = mix(mix(mix(data.keys[users], seed), stage), number)
    users = users[order := np.argsort(unit_interval(key_N, ORDER), kind="stable")]
    train = data.train
    places = 1 + (unit_interval(key_N[order], TARGET) * (train.lengths[users] - 1)).astype(np.int64)
    starts = train.offsets[users]
    positions, offsets = gather_ranges(starts, places)
    return NextItemSamples(Sequences(train.items[positions], offsets), train.items[starts + places])
