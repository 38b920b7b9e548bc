"""The order of samples: a pure function of (sample counts, seed, epoch), cut into global batches before it is dealt.

An epoch permutes the row groups and deals them to windows of about `WINDOW_BATCHES` global batches. A window permutes
its samples; what does not fill a global batch goes to tail windows at the end of the epoch, so an epoch holds every
sample once, except for fewer than one global batch. Finding the window of any step reads no data.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

WINDOW_BATCHES = 16  # one Ray Data task prepares one window: large enough to shuffle, small enough to hold in memory


@dataclass(frozen=True)
class Window:
    """Consecutive global batches that one task prepares.

    `parts` are slices (main_window, start, stop) of the samples of the epoch's main windows.
    """

    epoch: int
    index: int
    first_step: int  # of the run
    num_steps: int
    parts: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Plan:
    """Sample order of a run.

    Attributes:
        counts: samples in each row group, in manifest order.
        global_batch_size: samples per optimizer step, over all workers.
        seed: of the order.
        num_steps: length of the run in optimizer steps.
    """

    counts: tuple[int, ...]
    global_batch_size: int
    seed: int
    num_steps: int

    def __post_init__(self) -> None:
        """Refuses a batch that the data cannot fill even once."""
        if self.num_samples < self.global_batch_size:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is larger than the {self.num_samples} training samples: "
                "lower pretrain.global_batch_size, or choose views that more users have"
            )

    @cached_property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in every epoch."""
        return self.num_samples // self.global_batch_size

    @property
    def num_unused(self) -> int:
        """Samples that each epoch leaves out (other ones in each epoch), fewer than one global batch."""
        return self.num_samples % self.global_batch_size

    def windows(self, start_step: int = 0) -> list[tuple[int, int]]:
        """(epoch, index) of all windows that hold a step in [start_step, num_steps)."""
        wanted = []
        if start_step >= self.num_steps:
            return wanted
        for epoch in range(start_step // self.steps_per_epoch, (self.num_steps - 1) // self.steps_per_epoch + 1):
            wanted += [
                (epoch, window.index)
                for window in self.epoch_windows(epoch)
                if window.first_step < self.num_steps and window.first_step + window.num_steps > start_step
            ]
        return wanted

    def epoch_windows(self, epoch: int) -> tuple[Window, ...]:
        """All windows of an epoch in order: main windows, then tail windows."""
        return _epoch_windows(self, epoch)

    def window(self, epoch: int, index: int) -> Window:
        """One window of an epoch."""
        return next(window for window in self.epoch_windows(epoch) if window.index == index)

    def samples(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Order of a window: row group and sample number within it, each int64 (num_steps * global_batch_size,)."""
        counts = np.asarray(self.counts)
        row_groups, numbers = [], []
        for main_index, start, stop in window.parts:
            members = _main_windows(self, window.epoch)[main_index]
            # Permuted within row groups only before the cut: what a tail takes from here lies in one or two of them.
            rng = np.random.default_rng([self.seed, window.epoch, main_index, 3])
            row_groups.append(np.repeat(members, counts[members])[start:stop])
            numbers.append(np.concatenate([rng.permutation(count) for count in counts[members]])[start:stop])
        row_group, number = np.concatenate(row_groups), np.concatenate(numbers)
        order = self.rng(window.epoch, window.index).permutation(len(row_group))
        return row_group[order], number[order]

    def rng(self, epoch: int, window: int) -> np.random.Generator:
        """Random generator of one window; no other window or run length influences it."""
        return np.random.default_rng([self.seed, epoch, window])


@lru_cache(maxsize=4)
def _main_windows(plan: Plan, epoch: int) -> list[np.ndarray]:
    """Row groups of each main window."""
    num_windows = max(1, round(plan.num_samples / (WINDOW_BATCHES * plan.global_batch_size)))
    # Not [seed, epoch]: numpy pads it with zeros to the stream of window 0.
    order = np.random.default_rng([plan.seed, epoch, 0, 2]).permutation(len(plan.counts))
    return np.array_split(order, min(num_windows, len(order)))


@lru_cache(maxsize=4)
def _epoch_windows(plan: Plan, epoch: int) -> tuple[Window, ...]:
    counts, batch = np.asarray(plan.counts), plan.global_batch_size
    windows: list[Window] = []
    leftovers: list[tuple[int, int, int]] = []
    step = epoch * plan.steps_per_epoch
    main = _main_windows(plan, epoch)
    for index, members in enumerate(main):
        total = int(counts[members].sum())
        num_steps = total // batch
        if num_steps:
            windows.append(Window(epoch, index, step, num_steps, ((index, 0, num_steps * batch),)))
            step += num_steps
        if total % batch:
            leftovers.append((index, num_steps * batch, total))
    for number, (num_steps, parts) in enumerate(_cut_leftovers(leftovers, batch)):
        windows.append(Window(epoch, len(main) + number, step, num_steps, parts))
        step += num_steps
    return tuple(windows)


def _cut_leftovers(
    leftovers: list[tuple[int, int, int]], batch: int
) -> list[tuple[int, tuple[tuple[int, int, int], ...]]]:
    """Cuts the chain of leftover slices into pieces of at most WINDOW_BATCHES batches; the last may drop < 1 batch."""
    pieces, parts = [], []
    room = WINDOW_BATCHES * batch
    usable = sum(stop - start for _, start, stop in leftovers) // batch * batch
    for index, start, stop in leftovers:
        while start < stop and usable > 0:
            size = min(stop - start, room, usable)
            parts.append((index, start, start + size))
            start, room, usable = start + size, room - size, usable - size
            if room == 0 or usable == 0:
                pieces.append((sum(end - begin for _, begin, end in parts) // batch, tuple(parts)))
                parts, room = [], WINDOW_BATCHES * batch
    return pieces
