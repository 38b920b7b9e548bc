"""A trunk: one run at a constant learning rate, from which runs of several durations branch off to decay theirs.

A `wsd` run of n steps is, until its rate decays, the same whatever n is. So of runs that differ in n alone, the common
part is trained once: before its decay each takes a copy of the state, decays it, is measured, and the trunk goes on.
What a branch ends with is bit for bit what the run alone would have ended with.

Source: one long run for many durations from Hagele et al. 2024 (arXiv 2405.18392, section 4). Differs: none.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from userrep.config import ConfigError
from userrep.data.batch import UserBatch
from userrep.losses.gather import rank, world_size
from userrep.training.checkpoint import Snapshot, restore_snapshot
from userrep.training.optim import decay_start
from userrep.training.settings import PretrainConfig, open_training_stream
from userrep.training.state import TrainState, train_step


@dataclass
class Progress:
    """What the steps so far have shown; a branch has a copy of the trunk's.

    Attributes:
        losses: training loss of every step.
        curve: (step, loss of the evaluation) at the constant rate.
        seconds: of all steps, without evaluation and without the wait for checkpoints.
    """

    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    def copy(self) -> "Progress":
        """One that does not change with this."""
        return Progress(list(self.losses), list(self.curve), self.seconds)


GLANCES = (0.125, 0.25, 0.5, 1.0)  # of the steps at the constant rate: where the trunk is measured on its way


@dataclass(frozen=True)
class Hooks:
    """What a caller does on the way. All are called on every rank.

    Attributes:
        step: after every step: steps of the run at work, the state, what its steps have shown.
        glance: loss of the evaluation of a state.
        on_trunk: after every step at the constant rate, from each of which the call could go on: the state and what its
            steps have shown; where a checkpoint is due, it is saved here.
        finished: when a run has taken its last step: its number of steps, the state, what its steps have shown.
    """

    step: Callable[[int, TrainState, Progress], None]
    glance: Callable[[TrainState], float]
    on_trunk: Callable[[TrainState, Progress], None]
    finished: Callable[[int, TrainState, Progress], None]


def run_trunk(
    config: PretrainConfig,
    durations: Sequence[int],
    state: TrainState,
    objective: nn.Module,
    shards: Path,
    hooks: Hooks,
    progress: Progress | None = None,
) -> None:
    """Runs all durations, the shortest first. A collective over all ranks.

    Args:
        config: of the runs; its `num_steps` does not count.
        durations: optimizer steps of each run, ascending, at least one. Those that end before the state stands are
            not for this call.
        state: new, or restored from where `Hooks.on_trunk` was called.
        objective: over `state.model`, data-parallel where there are several ranks.
        shards: tokenized table.
        hooks: what is done on the way.
        progress: of a restored state.

    Raises:
        ConfigError: the learning rate of the config decays all the way, so there is no common part.
        NonFiniteLossError: as `train_step`.
    """
    if config.optim.schedule != "wsd":
        raise ConfigError(f"optim.schedule={config.optim.schedule}: runs share steps only with schedule wsd")
    progress = progress or Progress()
    for place, num_steps in enumerate(durations):
        for share in GLANCES:
            stop = round(share * decay_start(num_steps, config.optim))
            if stop <= state.step:
                continue
            _take_steps(config, num_steps, stop, state, objective, shards, hooks, progress, is_trunk=True)
            progress.curve.append((stop, hooks.glance(state)))
            hooks.on_trunk(state, progress)
        is_last = place == len(durations) - 1
        snapshot = None if is_last else Snapshot.take(state)
        branch = progress.copy()
        _take_steps(config, num_steps, num_steps, state, objective, shards, hooks, branch)
        hooks.finished(num_steps, state, branch)
        if snapshot is not None:
            restore_snapshot(snapshot, state)


def _take_steps(
    config: PretrainConfig,
    num_steps: int,
    stop: int,
    state: TrainState,
    objective: nn.Module,
    shards: Path,
    hooks: Hooks,
    progress: Progress,
    is_trunk: bool = False,
) -> None:
    """Takes the steps up to `stop` of a run of `num_steps`."""
    if state.step >= stop:
        return
    stream = open_training_stream(shards, config, stop)
    started = time.perf_counter()
    for batch in prefetched(stream.batches(state.step, rank(), world_size())):
        metrics = train_step(objective, state, batch, config.optim, num_steps)
        progress.losses.append(metrics["train/loss"])
        ended = time.perf_counter()
        progress.seconds += ended - started
        hooks.step(num_steps, state, progress)
        if is_trunk and state.step < stop:  # after the last one comes a look, which must not be lost
            hooks.on_trunk(state, progress)
        started = time.perf_counter()


def prefetched(batches: Iterator[UserBatch]) -> Iterator[UserBatch]:
    """The same batches; the next one is prepared in a thread while the caller works on one."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch
