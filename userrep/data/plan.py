"""The order of samples: a pure function of (sample counts, weights, seed), cut into global batches before it is dealt.

A source is an endless sequence of epochs without gaps, and each epoch is all samples of the source once, in an order of
its own. A fixed schedule interleaves the sequences of all sources in the stated proportions, and step s of the run
takes samples [s * G, (s + 1) * G) of the result, G being the global batch. So nothing is ever left out: an epoch's
remainder of less than one global batch opens the batch that the next epoch completes.

A window is a fixed number of steps, which one task prepares. Of every source it takes the next row groups of the epoch,
whose order is permuted, and permutes their samples; a row group that lies across the border of two windows is divided
at random. What a step holds follows from its number alone, so a run goes on at any step without reading a row.
"""

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np

from userrep.data.batch import gather_ranges

WINDOW_STEPS = 16  # of a window, unless row groups are large: enough to shuffle, few enough to hold in memory
WINDOW_ROW_GROUPS = 4  # in a window at the least: it reads one more than it takes, so at most a quarter is read twice
SHARE_BITS = 20  # shares of sources are multiples of 2**-20; the schedule then fits int64 up to 2**43 samples


class _Draw(IntEnum):
    """What a random number is drawn for; each has streams of its own."""

    ROW_GROUPS = 0
    CUT = 1
    WINDOW = 2
    EVENTS = 3


@dataclass(frozen=True)
class Coverage:
    """How often the samples of a source were seen: each `epochs` times, and `begun` of them once more.

    Attributes:
        samples: of the source.
        epochs: that are complete.
        begun: samples of the epoch that is not, 0 <= begun < samples.
    """

    samples: int
    epochs: int
    begun: int

    def __str__(self) -> str:
        """For people."""
        if self.epochs == 0:
            return f"{self.begun:,} of {self.samples:,} samples are seen, once; {self.samples - self.begun:,} never"
        return f"{self.samples:,} samples are seen {self.epochs:,} times each, {self.begun:,} of them once more"


@dataclass(frozen=True, eq=False)
class Plan:
    """Sample order of a run.

    Attributes:
        counts: of each source, the samples in each of its row groups, in manifest order, int64 (R_source,).
        weights: share of each source in the samples of the run, > 0; only their proportions count.
        global_batch_size: samples per optimizer step, over all sources and workers.
        seed: of the order, >= 0.
        num_steps: length of the run in optimizer steps.

    Raises:
        ValueError: a source cannot fill its share of one batch without a repetition, or a weight is of no use.
    """

    counts: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    global_batch_size: int
    seed: int
    num_steps: int

    def __post_init__(self) -> None:
        """Refuses what no order can be made of."""
        weights = self.weights
        if not self.counts or len(self.counts) != len(weights):
            raise ValueError(f"{len(weights)} weights for {len(self.counts)} sources: give every source one")
        if not all(0 < weight < np.inf for weight in weights):
            raise ValueError(f"weights of sources are {list(weights)}: all must be positive, leave out the others")
        if not all(0 < ratio < 1 << SHARE_BITS for ratio in self._ratios):
            raise ValueError(
                f"weights of sources are {list(weights)}: each source needs a share of at least 2**-{SHARE_BITS}, "
                "give it more weight or leave it out"
            )
        for source, (size, weight) in enumerate(zip(self.num_samples, weights, strict=True)):
            share = math.ceil(self.global_batch_size * weight / sum(weights))
            if size < share:
                where = "" if len(weights) == 1 else f" of source {source}, of which it takes {share}"
                remedy = "" if len(weights) == 1 else ", or the source's weight"
                raise ValueError(
                    f"global_batch_size={self.global_batch_size} is larger than the {size} training samples{where}: "
                    f"lower pretrain.global_batch_size{remedy}, or choose views that more users have"
                )

    @cached_property
    def num_samples(self) -> tuple[int, ...]:
        """Samples in an epoch of each source."""
        return tuple(int(counts.sum()) for counts in self.counts)

    @cached_property
    def first_row_groups(self) -> np.ndarray:
        """Where the row groups of each source begin when they are counted through all sources, int64 (sources + 1,)."""
        return np.cumsum([0] + [len(counts) for counts in self.counts])

    @cached_property
    def window_steps(self) -> int:
        """Steps of a window, the last one of a run included."""
        mean_sizes = sum(-(-size // len(counts)) for size, counts in zip(self.num_samples, self.counts, strict=True))
        return max(WINDOW_STEPS, -(-WINDOW_ROW_GROUPS * mean_sizes // self.global_batch_size))

    def windows(self, start_step: int = 0) -> range:
        """Numbers of all windows that hold a step in [start_step, num_steps)."""
        if start_step >= self.num_steps:
            return range(0)
        return range(start_step // self.window_steps, (self.num_steps - 1) // self.window_steps + 1)

    def coverage(self, num_steps: int) -> list[Coverage]:
        """How often every source's samples are seen in the first `num_steps` steps."""
        taken = self.taken(num_steps * self.global_batch_size)
        return [Coverage(size, *divmod(count, size)) for size, count in zip(self.num_samples, taken, strict=True)]

    @overload
    def taken(self, total: int) -> list[int]: ...
    @overload
    def taken(self, total: np.ndarray) -> list[np.ndarray]: ...
    def taken(self, total: Any) -> list[Any]:
        """How many of the first `total` samples of the run come from each source.

        The first source takes its share of the samples, the second one its share of the rest, and so on, each rounded
        to the nearest sample. So the counts never fall, sum to `total`, and differ from the shares by no more than half
        a sample per source.
        """
        counts, rest = [], total
        for ratio in self._ratios:
            counts.append((rest * ratio + (1 << SHARE_BITS - 1)) >> SHARE_BITS)
            rest = rest - counts[-1]
        return [*counts, rest]

    @cached_property
    def _ratios(self) -> tuple[int, ...]:
        """Share of each source but the last in what the sources before it leave, in units of 2**-SHARE_BITS."""
        rests = np.cumsum(self.weights[::-1])[::-1]
        return tuple(round(w / rest * (1 << SHARE_BITS)) for w, rest in zip(self.weights[:-1], rests[:-1], strict=True))

    def samples(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of a window, all of its steps one after another.

        Returns:
            Row group, counted through all sources, and sample number within it, each int64 (window_steps * G,).
        """
        size = self.window_steps * self.global_batch_size
        taken = self.taken(np.arange(window * size, (window + 1) * size + 1))
        ordered = np.empty((2, size), dtype=np.int64)
        for source, counts in enumerate(taken):
            ordered[:, np.diff(counts) > 0] = self._of_source(source, window, int(counts[0]), int(counts[-1]))
        return ordered[0], ordered[1]

    def rng(self, step: int) -> np.random.Generator:
        """Random generator for what is drawn for the global batch of a step."""
        return self._rng(_Draw.EVENTS, step)

    def _of_source(self, source: int, window: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of the sequence of a source, (2, stop - start). The range is the window's."""
        parts, size = [np.empty((2, 0), dtype=np.int64)], self.num_samples[source]
        for epoch in range(start // size, -(-stop // size)):
            # Epochs do not mix: an epoch is over before the next one begins, also within a window.
            part = self._of_epoch(source, epoch, max(start - epoch * size, 0), min(stop - epoch * size, size))
            parts.append(part[:, self._rng(_Draw.WINDOW, source, window, epoch).permutation(part.shape[1])])
        return np.concatenate(parts, axis=1)

    def _of_epoch(self, source: int, epoch: int, start: int, stop: int) -> np.ndarray:
        """Samples [start, stop) of an epoch, start < stop, in the order of its row groups."""
        counts = self.counts[source]
        order = _row_group_order(self.seed, source, epoch, len(counts))
        ends = np.cumsum(counts[order])
        first, last = np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop, side="left")
        members = order[first : last + 1]
        numbers, borders = gather_ranges(np.zeros(len(members), dtype=np.int64), counts[members])
        for edge in {0, len(members) - 1}:
            # Other windows take the other parts of these two, so what orders them is the epoch, not the window.
            inside = slice(borders[edge], borders[edge + 1])
            rng = self._rng(_Draw.CUT, source, epoch, int(members[edge]))
            numbers[inside] = rng.permutation(numbers[inside])
        begin = start - (ends[first] - counts[members[0]])
        whole = np.stack([self.first_row_groups[source] + np.repeat(members, np.diff(borders)), numbers])
        return whole[:, begin : begin + stop - start]

    def _rng(self, draw: _Draw, *place: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(draw, *place)))


@lru_cache(maxsize=4)
def _row_group_order(seed: int, source: int, epoch: int, num_row_groups: int) -> np.ndarray:
    """Permuted row groups of an epoch, int32 (num_row_groups,). Keyed by value: tasks unpickle a plan of their own."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_Draw.ROW_GROUPS, source, epoch)))
    order = rng.permutation(np.arange(num_row_groups, dtype=np.int32))
    order.flags.writeable = False  # all callers share it
    return order
