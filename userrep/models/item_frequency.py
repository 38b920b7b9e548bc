"""How often an item is in a batch, estimated as batches pass by.

Legend: `M` hash functions, `H` entries of each, `G` items of the global batch.
"""

import torch
from pydantic import Field
from torch import nn

from userrep.config import Config

# Odd multipliers of splitmix64 (Steele et al., OOPSLA 2014) as signed numbers: int64 arithmetic wraps as it should.
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
GOLDEN_GAMMA = 0x9E3779B97F4A7C15


class FrequencyConfig(Config):
    """Size of the estimate."""

    num_entries: int = Field(default=1 << 18, ge=1)  # of each hash function; well above the number of items
    num_hashes: int = Field(default=1, ge=1)
    rate: float = Field(default=0.05, gt=0, le=1)  # weight of the latest gap


class ItemFrequency(nn.Module):
    """Running mean of the steps between two batches that hold an item; its inverse is the item's probability.

    Its state is in buffers that are the same on all workers, so a checkpoint goes on exactly.

    Source: Yi et al. 2019 (RecSys, "Sampling-bias-corrected neural modeling for large corpus item recommendations",
    algorithms 2 and 3), several hash functions by the largest gap among them.
    Differs: the first gap of an item counts from before the first step and is taken as it is, where the source starts
    from a constant; an item that no batch has held yet has the gap that it would have if the next one held it.
    """

    last_step: torch.Tensor
    gap: torch.Tensor

    def __init__(self, config: FrequencyConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.num_hashes, config.num_entries)
        self.register_buffer("last_step", torch.full(shape, -1, dtype=torch.int64))
        self.register_buffer("gap", torch.zeros(shape, dtype=torch.float64))

    @torch.no_grad()
    def update(self, keys_G: torch.Tensor, step: int) -> None:
        """Notes that the batch of a step held these items, each counted once; a second time changes nothing.

        Args:
            keys_G: 64-bit keys of the items of the global batch, int64; the same on all workers.
            step: number of the batch, from 0, ascending from call to call.
        """
        for number, place_G in enumerate(self._places(keys_G)):
            places = place_G.unique()
            last, before = self.last_step[number, places], self.gap[number, places]
            latest = (step - last).to(before.dtype)
            gap = torch.where(last < 0, latest, before + self.config.rate * (latest - before))
            is_new = last < step
            self.gap[number, places] = torch.where(is_new, gap, before)
            self.last_step[number, places] = torch.where(is_new, step, last)

    @torch.no_grad()
    def log_probabilities(self, keys: torch.Tensor) -> torch.Tensor:
        """Log of the estimated probability that a batch holds an item; float64, <= 0, in the shape of `keys`."""
        unseen_gap = (self.last_step.max() + 2).to(self.gap.dtype)
        gaps = [self.gap[number, place] for number, place in enumerate(self._places(keys))]
        gap = torch.stack([torch.where(gap > 0, gap, unseen_gap) for gap in gaps]).amax(dim=0)
        return -gap.clamp(min=1).log()

    def _places(self, keys: torch.Tensor) -> list[torch.Tensor]:
        """Entry of every key under each hash function."""
        places = []
        for number in range(self.config.num_hashes):
            offset = (number + 1) * GOLDEN_GAMMA % 2**64
            mixed = keys + (offset - 2**64 if offset >= 2**63 else offset)
            mixed = (mixed ^ _shift(mixed, 30)) * MIX_1
            mixed = (mixed ^ _shift(mixed, 27)) * MIX_2
            places.append((mixed ^ _shift(mixed, 31)) % self.config.num_entries)  # torch's remainder is >= 0
        return places


def _shift(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift to the right of 64-bit numbers, which torch shifts arithmetically."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
