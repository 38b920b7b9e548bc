"""The training loop on Ray Train: restore, iterate, step, validate, record. Ray Train is known here, and to preflight.

Nothing is reported to Ray Train: a report is a barrier that takes two seconds, and what it would keep (checkpoints,
metrics) is in the run directory, where a run continues whatever has become of its cluster.
"""

import faulthandler
import logging
import os
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import ray
import ray.train
import ray.train.torch
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig
from torch.distributed.distributed_c10d import _set_pg_timeout

from userrep.data.batch import UserBatch, from_table
from userrep.data.pool import Pool, load_pool
from userrep.data.stream import TrainingStream, execution_options
from userrep.data.tokenizer import read_idf
from userrep.losses.gather import rank, world_size
from userrep.manifest import Manifest, read_manifest
from userrep.models.clue import Clue, count_parameters
from userrep.training.checkpoint import checkpoint_step, latest_checkpoint, recover_checkpoint, restore_checkpoint
from userrep.training.fence import StaleAttemptError, current_attempt, patiently, start_attempt, take_over
from userrep.training.objective import ClueObjective
from userrep.training.optim import build_optimizer
from userrep.training.preflight import check_disk, check_memory, check_storage, inspect_nodes, reserved_cpus
from userrep.training.recorder import Recorder, write_evidence
from userrep.training.settings import PretrainConfig, WorkersConfig, check_batch_divides, open_training_stream
from userrep.training.state import NonFiniteLossError, TrainState, train_step
from userrep.training.tracking import SPOOL_NAME
from userrep.training.validation import validate

logger = logging.getLogger("ray.train.userrep")  # below Ray Train's logger, which writes to the run's log files

CHECKPOINTS = "checkpoints"
PREFETCH_BATCHES = 4
PREEMPTION_INTERVAL_S = 5.0  # between looks for a notice; Ray's own watcher looks as often
START_TIMEOUT_S = 300  # until all workers have taken a step: imports, restoring, the start of Ray Data
STALL_FACTOR = 15


class TrainingError(RuntimeError):
    """A worker failed, again and again; the message names the first worker's exception."""


def train(shards: Path, run_dir: Path, config: PretrainConfig, workers: WorkersConfig) -> None:
    """Runs (or resumes) a pretraining run to its last step; checkpoints and metrics are left in `run_dir`.

    Args:
        shards: tokenized shards, absolute path that all nodes share.
        run_dir: absolute path that all nodes share; one run config only.
        config: the run.
        workers: where it runs.

    Raises:
        ConfigError: the run cannot start here.
        StaleAttemptError: another call of this function has taken the run over.
        TrainingError: it started and failed; what it reached stays in its last checkpoint.
    """
    check_batch_divides(config, workers)
    if checkpoint_step(latest_checkpoint(run_dir / CHECKPOINTS)) == config.num_steps:
        return
    stream = open_training_stream(shards, config)
    cpus = _preflight(stream.directories, run_dir, config, workers, read_manifest(shards))
    job = uuid.uuid4().hex
    patiently(lambda: take_over(run_dir, job))
    for name in ("RAY_TRAIN_COLLECTIVE_TIMEOUT_S", "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"):
        os.environ[name] = str(workers.timeout_s)  # Ray Train has no arguments for them
    settings = {
        "shards": str(shards),
        "run_dir": str(run_dir),
        "job": job,
        "config": config.model_dump(mode="json"),
        "workers": workers.model_dump(mode="json"),
    }
    trainer = _make_trainer(settings, run_dir, workers, stream, cpus)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _explain(error) from error
    if result.return_value is not None:
        raise TrainingError(str(result.return_value))


def _explain(error: Exception) -> Exception:
    """What a failure of Ray Train means to the caller of `train`."""
    if isinstance(error, ray.train.WorkerGroupError):
        failures = [(f"worker {rank_} failed", cause) for rank_, cause in sorted(error.worker_failures.items())]
    else:
        failures = [("the workers could not be started", getattr(error, "controller_failure", error))]
    stale = [cause for _, cause in failures if isinstance(cause, StaleAttemptError)]
    return stale[0] if stale else TrainingError("{}: {}".format(*failures[0]))


def _make_trainer(
    settings: dict[str, Any], run_dir: Path, workers: WorkersConfig, stream: TrainingStream, cpus: float
) -> ray.train.torch.TorchTrainer:
    return ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker={"CPU": cpus}
        ),
        torch_config=ray.train.torch.TorchConfig(timeout_s=START_TIMEOUT_S),
        # A name of its own for every call: Ray Train must not restore anything, the run's own checkpoints do.
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        datasets={"train": cast(Any, partial(_start_group, run_dir, settings["job"]))},
        dataset_config=_Dealer(stream),
    )


def _preflight(
    sources: tuple[Path, ...], run_dir: Path, config: PretrainConfig, workers: WorkersConfig, manifest: Manifest
) -> float:
    """Refuses what cannot run here. Returns the CPUs that each worker reserves."""
    fewest, most = workers.bounds
    cpus = reserved_cpus(most, ray.cluster_resources().get("CPU", 0))
    with torch.device("meta"):
        num_parameters = count_parameters(Clue(config.model, manifest.facts["vocab_size"]))["total"]
    nodes = inspect_nodes(run_dir, sources)
    check_storage(run_dir, sources, nodes)
    check_memory(num_parameters, workers.memory.budget_mib, fewest, nodes, workers.use_gpu)
    check_disk(num_parameters, config.keep_checkpoints, run_dir)
    return cpus


def _start_group(run_dir: Path, job: str) -> int:
    """Starts an attempt. Ray Train's controller calls it before every start of a worker group.

    Returns:
        The step at which the attempt starts.
    """
    # Read by the controller, in whose process this runs: a worker that is lost cannot leave its process group in order.
    os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "2"
    checkpoints = run_dir / CHECKPOINTS

    def choose_checkpoint() -> str | None:
        found = recover_checkpoint(checkpoints)
        return found.name if found else None

    attempt = patiently(lambda: start_attempt(run_dir, job, choose_checkpoint))
    return checkpoint_step(checkpoints / attempt.checkpoint if attempt.checkpoint else None)


class _Dealer(DataConfig):
    """Deals a stream to as many workers as a group has: Ray Train tells their number nowhere else in time."""

    def __init__(self, stream: TrainingStream) -> None:
        super().__init__(datasets_to_split=["train"], execution_options=execution_options())
        self._stream = stream

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Called once per start of a worker group; what `_start_group` returned stands in the place of a dataset."""
        dataset = self._stream.dataset(world_size, start_step=datasets["train"])
        return super().configure({"train": dataset}, world_size, worker_handles, worker_node_ids, **kwargs)


def train_worker(settings: dict[str, Any]) -> str | None:
    """What every worker runs. Returns why the run has to end, where starting again could not help; None: it is done."""
    _end_after(START_TIMEOUT_S)
    try:
        return _work(settings)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _work(settings: dict[str, Any]) -> str | None:
    config, workers = PretrainConfig.parse(settings["config"]), WorkersConfig.parse(settings["workers"])
    shards, run_dir = Path(settings["shards"]), Path(settings["run_dir"])
    attempt = current_attempt(run_dir, settings["job"])
    local_workers = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(workers.threads or max(1, len(os.sched_getaffinity(0)) // local_workers))
    manifest = read_manifest(shards)
    state = build_state(config, manifest, shards)
    if attempt.checkpoint is not None:
        restore_checkpoint(run_dir / CHECKPOINTS / attempt.checkpoint, state)
    if state.step == config.num_steps:  # the attempt before was lost after its last checkpoint
        return None
    pool = load_pool(shards, manifest.facts["shards"], config.views, "validation", config.pool_size)
    recorder = None
    if rank() == 0:
        checkpoints, spool = run_dir / CHECKPOINTS, run_dir / SPOOL_NAME
        recorder = Recorder(attempt, checkpoints, spool, settings["config"], config.keep_checkpoints, state.step)
    try:
        _take_steps(config, workers, state, pool, recorder)
    except NonFiniteLossError as error:  # the same steps would lead to it again
        return f"{error}. What is known is in {write_evidence(attempt, error)}"
    finally:
        if recorder is not None:
            recorder.close()


def _take_steps(
    config: PretrainConfig, workers: WorkersConfig, state: TrainState, pool: Pool, recorder: Recorder | None
) -> None:
    clue = ClueObjective(state.model, config.optim.bag_steps, config.loss, workers.memory, config.precision)
    objective = ray.train.torch.prepare_model(
        clue,
        # Blocks that the first steps leave out have no gradient there.
        parallel_strategy_kwargs={"find_unused_parameters": config.optim.bag_steps > 0},
    )
    is_first, notice = True, _Notice()
    waiting_since = time.perf_counter()
    for batch in _batches():
        if batch.step != state.step:
            raise RuntimeError(f"the stream delivered step {batch.step} where step {state.step} is due")
        started = time.perf_counter()
        metrics = train_step(objective, state, batch, config.optim, config.num_steps)
        ended = time.perf_counter()
        if is_first:
            logger.info("%s, chunks of %d", clue.describe(), metrics["train/chunk_size"])
            if world_size() > 1:
                _set_pg_timeout(timedelta(seconds=workers.timeout_s))
            is_first = False
        _end_after(STALL_FACTOR * workers.timeout_s)
        metrics["time/input_wait_s"] = started - waiting_since
        metrics["time/step_s"] = ended - started
        for what in ("users", "tokens"):
            metrics[f"train/{what}_per_s"] = metrics.pop(f"train/{what}") / (ended - started)
        if state.step == config.num_steps or state.step % config.validate_every == 0:
            metrics |= validate(state.model, pool)
        is_new_notice = notice.look(state.time_s)
        if recorder is not None:
            recorder.record(state, metrics, is_urgent=is_new_notice)
        waiting_since = time.perf_counter()
    if state.step != config.num_steps:
        raise RuntimeError(f"the stream ended after step {state.step} of {config.num_steps}")
    if recorder is not None:
        recorder.finish()


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


def build_state(config: PretrainConfig, manifest: Manifest, shards: Path) -> TrainState:
    """A freshly initialised model and optimizer; the same numbers in every process for the same seed."""
    torch.manual_seed(config.seed)
    model = Clue(config.model, manifest.facts["vocab_size"], torch.from_numpy(read_idf(shards)))
    return TrainState(model=model, optimizer=build_optimizer(model, config.optim), seed=config.seed)
