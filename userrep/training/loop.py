"""The training loop, in every worker: restore, iterate, step, validate, record.

Nothing is reported to Ray Train: a report is a barrier that takes two seconds, and what it would keep (checkpoints,
metrics) is in the run directory, where a run continues whatever has become of its cluster.
"""

import faulthandler
import logging
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from userrep import storage
from userrep.data.batch import UserBatch, from_table
from userrep.losses.gather import rank, world_size
from userrep.mirror import shown
from userrep.training.checkpoint import CHECKPOINTS, restore_checkpoint
from userrep.training.fence import Attempt, current_attempt, patiently
from userrep.training.recorder import Recorder, evidence_path, write_evidence
from userrep.training.settings import PretrainConfig, WorkersConfig
from userrep.training.state import NonFiniteLossError, TrainState, train_step
from userrep.training.system import System, Validate
from userrep.training.systems import build_state, open_system, parse_pretraining
from userrep.training.tracking import SPOOL_NAME

logger = logging.getLogger("ray.train.userrep")  # below Ray Train's logger, which writes to the run's log files

PREFETCH_BATCHES = 4
PREEMPTION_INTERVAL_S = 5.0  # between looks for a notice; Ray's own watcher looks as often
START_TIMEOUT_S = 300  # until all workers have taken a step: imports, restoring, the start of Ray Data
SLOW_FACTOR = 10  # a step may take so many times as long as the longest one before it
GRACE_S = 3  # by which a collective's own limit, whose error says more, comes first


def train_worker(settings: dict[str, Any]) -> str | None:
    """What every worker runs. Returns why the run has to end, where starting again could not help; None: it is done."""
    _end_after(START_TIMEOUT_S)
    attempt = current_attempt(Path(settings["run_dir"]), settings["job"])
    try:
        attempt.begin()
        return _work(settings, attempt)
    except Exception as error:
        attempt.note_failure(rank(), error)  # the controller may have to say why it gives up
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def _work(settings: dict[str, Any], attempt: Attempt) -> str | None:
    config, workers = parse_pretraining(settings["config"]), WorkersConfig.parse(settings["workers"])
    shards, run_dir = storage.fetch(Path(settings["shards"])), attempt.run_dir
    local_workers = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(workers.threads or max(1, len(os.sched_getaffinity(0)) // local_workers))
    system, state = open_system(config, shards), build_state(config, shards)
    if attempt.checkpoint is not None:
        restore_checkpoint(run_dir / CHECKPOINTS / attempt.checkpoint, state)
    if state.step == config.num_steps:  # the attempt before was lost after its last checkpoint
        return None
    validate = system.load_validation()
    with _recorder(attempt, settings["config"], config.keep_checkpoints, state.step) as recorder:
        try:
            _take_steps(config, workers, system, state, validate, recorder)
        except NonFiniteLossError as error:  # the same steps would lead to it again
            if rank() == 0:
                patiently(partial(write_evidence, attempt, error))
            return f"{error}. What is known is in {shown(evidence_path(attempt, error))}"
    return None


@contextmanager
def _recorder(attempt: Attempt, config: dict[str, Any], keep: int, start_step: int) -> Iterator[Recorder | None]:
    """The recorder of rank 0, open for the block; None for other ranks."""
    if rank() != 0:
        yield None
        return
    with storage.private(attempt.run_dir) as directory:
        own = replace(attempt, run_dir=directory)
        recorder = Recorder(own, directory / CHECKPOINTS, directory / SPOOL_NAME, config, keep, start_step)
        with closing(recorder):
            yield recorder


def _take_steps(
    config: PretrainConfig,
    workers: WorkersConfig,
    system: System,
    state: TrainState[Any],
    validate: Validate,
    recorder: Recorder | None,
) -> None:
    bare = system.build_objective(state.model, workers.memory)
    objective = ray.train.torch.prepare_model(
        bare, parallel_strategy_kwargs={"find_unused_parameters": system.has_idle_parameters}
    )
    patient_group = _patient_group() if world_size() > 1 else None
    is_first, notice, watchdog = True, _Notice(), _Watchdog(workers.timeout_s)
    waiting_since = time.perf_counter()
    for batch in _batches():
        if batch.step != state.step:
            raise RuntimeError(f"the stream delivered step {batch.step} where step {state.step} is due")
        started = time.perf_counter()
        metrics = train_step(objective, state, batch, config.optim, config.num_steps)
        ended = time.perf_counter()
        if is_first:
            logger.info("%s", bare.describe())
            if world_size() > 1:
                _set_pg_timeout(timedelta(seconds=workers.timeout_s))
        watchdog.saw(ended - (started if is_first else waiting_since))
        is_first = False
        metrics["time/input_wait_s"] = started - waiting_since
        metrics["time/step_s"] = ended - started
        for what in ("users", "tokens"):
            metrics[f"train/{what}_per_s"] = metrics.pop(f"train/{what}") / (ended - started)
        is_validated = state.step == config.num_steps or state.step % config.validate_every == 0
        if is_validated:
            _end_after(START_TIMEOUT_S)
            metrics |= validate(state.model)
        is_new_notice = notice.look(state.time_s)
        if recorder is not None:
            recorder.record(state, metrics, is_urgent=is_new_notice)
        if is_validated and patient_group is not None:
            dist.barrier(patient_group)  # rank 0 may have to wait for its disk, longer than others wait in a step
        watchdog.expect_a_step(is_of_another_kind=state.step == config.optim.bag_steps)
        waiting_since = time.perf_counter()
    if state.step != config.num_steps:
        raise RuntimeError(f"the stream ended after step {state.step} of {config.num_steps}")
    if recorder is not None:
        _end_after(START_TIMEOUT_S)
        recorder.finish()


def _patient_group() -> dist.ProcessGroup:
    group = dist.new_group(timeout=timedelta(seconds=START_TIMEOUT_S))
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return group


def _batches() -> Iterator[UserBatch]:
    """This worker's part of the global batches, step by step."""
    stream = cast(ray.data.DataIterator, ray.train.get_dataset_shard("train"))
    blocks = stream.iter_batches(
        batch_size=cast(int, None),  # whole blocks; Ray's annotation has forgotten its own None
        batch_format="pyarrow",
        prefetch_batches=PREFETCH_BATCHES,
    )
    for table in blocks:
        yield from_table(cast(pa.Table, table))


class _Watchdog:
    """Ends this process when it takes far longer to its next step than it has ever taken: something hangs."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._longest_s = timeout_s, 0.0

    def saw(self, seconds: float) -> None:
        """Args: seconds that a step took, with the wait for its batch."""
        self._longest_s = max(self._longest_s, seconds)

    def expect_a_step(self, is_of_another_kind: bool) -> None:
        """Args: is_of_another_kind: how long it may take cannot be told from those before it."""
        limit_s = max(self._timeout_s, SLOW_FACTOR * self._longest_s) + GRACE_S
        _end_after(max(limit_s, START_TIMEOUT_S) if is_of_another_kind else limit_s)


class _Notice:
    """Looks from time to time whether a node of the workers is about to be taken away."""

    def __init__(self) -> None:
        self._last_look_s = 0.0
        self._known: ray.train.PreemptionInfo | None = None

    def look(self, time_s: float) -> bool:
        """Whether there is news. A collective, so its argument is a time that all workers agree on."""
        if time_s - self._last_look_s < PREEMPTION_INTERVAL_S:
            return False
        self._last_look_s, before = time_s, self._known
        self._known = ray.train.get_preemption_info()
        if self._known is None or self._known == before:
            return False
        logger.warning("ranks %s are about to be taken away: saving a checkpoint", self._known.preempted_ranks)
        return True


def _end_after(seconds: float) -> None:
    """Ends this process with all its stacks in the log, unless it is called again before."""
    # In C, so it also works where Python does not get to run; 2 is what Ray keeps as the worker's error log.
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)
