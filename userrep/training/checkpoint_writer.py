"""Checkpoints behind the steps: a step pays for a copy of the tensors, a thread writes them to disk."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from userrep.training.checkpoint import Snapshot, write_checkpoint
from userrep.training.fence import Attempt, patiently
from userrep.training.state import TrainState

MAX_SHARE = 0.03  # of the time, for checkpoints that are due; the thread's time counts in full, as it takes a core


class CheckpointWriter:
    """Writes the checkpoints of an attempt; at most one is on its way.

    How often is a matter of what one costs: copy and disk work together take at most `MAX_SHARE` of the time. A small
    model is saved every second or two, and a large one as often as its storage can take.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        keep: int,
        attempt: Attempt,
        before_commit: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: as in `write_checkpoint`; before_commit is called by the thread; clock gives seconds."""
        self._directory, self._config, self._keep, self._attempt = directory, config, keep, attempt
        self._before_commit, self._clock = before_commit, clock
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._snapshot: Snapshot | None = None
        self._pending: Future[None] | None = None
        self._last_start = float("-inf")
        self.stall_s = self.write_s = 0.0  # of the last checkpoint: what the step paid, what the thread took

    @property
    def interval_s(self) -> float:
        """Seconds from one checkpoint to the next that is due; 0 before the first one has shown what it costs."""
        return (self.stall_s + self.write_s) / MAX_SHARE

    def is_due(self, is_urgent: bool = False) -> bool:
        """Whether none is on its way, and the last one was long enough ago or another one is urgent."""
        return self._pending is None and (is_urgent or self._clock() >= self._last_start + self.interval_s)

    def save(self, state: TrainState, metrics: dict[str, float]) -> None:
        """Starts a checkpoint of a state as it is now; waits first for one that is on its way.

        Raises:
            OSError: the last one could not be written.
            StaleAttemptError: a newer attempt has the run.
        """
        self.wait()
        self._last_start = self._clock()
        self._snapshot = Snapshot.take(state, reuse=self._snapshot)
        self.stall_s = self._clock() - self._last_start
        self._pending = self._executor.submit(self._write, self._snapshot, metrics)

    def poll(self) -> None:
        """Raises what has kept the last checkpoint from being written. Does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when the disk has everything, or raises as `save` does."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Ends the thread; what is on its way is still written."""
        self._executor.shutdown()

    def _write(self, snapshot: Snapshot, metrics: dict[str, float]) -> None:
        def write() -> None:
            started = self._clock()  # of the try that succeeds: an outage says nothing of what a checkpoint costs
            self._before_commit()
            write_checkpoint(self._directory, snapshot, self._config, metrics, self._keep, self._attempt)
            self.write_s = self._clock() - started

        patiently(write)
