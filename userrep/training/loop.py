"""The training loop on Ray Train: restore, iterate, step, validate, checkpoint. Only here is Ray Train known."""

import logging
import os
import time
from pathlib import Path
from typing import Any, Self, cast

import ray
import ray.train
import ray.train.torch
import torch
from pydantic import Field, model_validator
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig

from userrep.config import Config, ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.batch import from_table
from userrep.data.pool import load_pool
from userrep.data.stream import execution_options, make_plan, stream_dataset
from userrep.data.tokenizer import read_idf
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, read_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.training.checkpoint import checkpoint_step, latest_checkpoint, restore_checkpoint, save_checkpoint
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import ClueObjective, LossConfig, Precision
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.state import TrainState, train_step
from userrep.training.tracking import MetricSpool
from userrep.training.validation import validate

logger = logging.getLogger("ray.train.userrep")  # below Ray Train's logger, which writes to the run's log files

CHECKPOINTS = "checkpoints"
SPOOL_NAME = "metrics.jsonl"
COLLECTIVE_TIMEOUT_S = 300  # a rank that is gone becomes an error instead of a hang
PREFETCH_BATCHES = 4


class TrainingError(RuntimeError):
    """A worker failed, again and again; the message names the first worker's exception."""


class PretrainConfig(Config):
    """One pretraining run."""

    model: ClueConfig = ClueConfig()
    views: ViewConfig = ViewConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    global_batch_size: int = Field(default=512, ge=2)  # users per optimizer step, over all workers
    num_steps: int = Field(default=300, ge=1)
    validate_every: int = Field(default=50, ge=1)  # steps between validations, each of which commits a checkpoint
    pool_size: int = Field(default=1000, ge=2)  # held-out users of a validation
    keep_checkpoints: int = Field(default=2, ge=1)  # newest ones; the best one is kept as well
    precision: Precision = "float32"  # of the encoder's matrix products; weights and loss are float32
    seed: int = 0

    @model_validator(mode="after")
    def _mixed_views_are_cut_at_random(self) -> Self:
        if "mixed" in self.views.kinds and (self.views.kinds[0] == "mixed" or self.augment.cut != "random"):
            raise ValueError(
                "`mixed` views are for training: put another kind first in views.kinds, set augment.cut=random"
            )
        return self


class WorkersConfig(Config):
    """Where a run is executed. No part of a run's identity: the result does not depend on it."""

    num_workers: int = Field(default=1, ge=1)
    threads: int = Field(default=0, ge=0)  # torch threads of a worker; 0 = the machine's cores over the workers
    use_gpu: bool = False
    memory: MemoryConfig = MemoryConfig()
    max_failures: int = Field(default=3, ge=-1)  # worker-group restarts from the last checkpoint


def check_batch_divides(config: PretrainConfig, workers: WorkersConfig) -> None:
    """Refuses a global batch that cannot be dealt evenly, before anything starts.

    Raises:
        ConfigError: with the batch sizes and numbers of workers that would work.
    """
    size, count = config.global_batch_size, workers.num_workers
    if size % count:
        sizes = " or ".join(str(n * count) for n in (size // count, size // count + 1) if n * count >= 2)
        counts = ", ".join(str(n) for n in range(1, 2 * count + 1) if size % n == 0)
        raise ConfigError(
            f"pretrain.global_batch_size={size} does not divide over workers.num_workers={count}: "
            f"use a batch of {sizes} users, or one of these numbers of workers: {counts}"
        )


def reserved_cpus(workers: WorkersConfig, cluster_cpus: float) -> float:
    """CPUs to reserve for each worker, which leave one for Ray Data.

    Raises:
        ConfigError: the cluster has no CPU for Ray Data.
    """
    if cluster_cpus < 2:
        raise ConfigError(
            f"the Ray cluster has {cluster_cpus:g} CPU, and training and its input need one each: give it 2"
        )
    return min(1.0, (cluster_cpus - 1) / workers.num_workers)


def train(shards: Path, run_dir: Path, config: PretrainConfig, workers: WorkersConfig) -> None:
    """Runs (or resumes) a pretraining run to its last step; checkpoints and metrics are left in `run_dir`.

    Args:
        shards: tokenized shards, absolute path that all nodes share.
        run_dir: absolute path that all nodes share; one run config only.
        config: the run.
        workers: where it runs.

    Raises:
        ConfigError: the run cannot start here.
        TrainingError: it started and failed; what it reached stays in its last checkpoint.
    """
    check_batch_divides(config, workers)
    manifest = read_manifest(shards)
    plan = make_plan(manifest.facts["shards"], config.views, config.global_batch_size, config.seed, config.num_steps)
    cpus = reserved_cpus(workers, ray.cluster_resources().get("CPU", 0))

    def remaining() -> ray.data.Dataset:
        # Called at every start of the worker group; the workers restore the same checkpoint, nobody writes in between.
        step = checkpoint_step(latest_checkpoint(run_dir / CHECKPOINTS))
        return stream_dataset(
            shards, manifest.facts["shards"], config.views, config.augment, plan, workers.num_workers, step
        )

    trainer = ray.train.torch.TorchTrainer(
        train_worker,
        train_loop_config={
            "shards": str(shards),
            "run_dir": str(run_dir),
            "config": config.model_dump(mode="json"),
            "threads": workers.threads,
            "memory": workers.memory.model_dump(mode="json"),
        },
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers, use_gpu=workers.use_gpu, resources_per_worker={"CPU": cpus}
        ),
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        # A name of its own for every attempt: Ray Train must not restore anything, the run's own checkpoints do.
        run_config=RunConfig(
            name=f"attempt-{time.time_ns()}",
            storage_path=str(run_dir / "ray"),
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
        datasets={"train": remaining},
        dataset_config=DataConfig(datasets_to_split=["train"], execution_options=execution_options()),
    )
    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        rank_, cause = min(error.worker_failures.items())
        raise TrainingError(f"worker {rank_} failed: {cause}") from error


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker runs."""
    config = PretrainConfig.parse(settings["config"])
    shards, run_dir = Path(settings["shards"]), Path(settings["run_dir"])
    context = ray.train.get_context()
    torch.set_num_threads(settings["threads"] or max(1, len(os.sched_getaffinity(0)) // context.get_local_world_size()))
    manifest = read_manifest(shards)
    state = build_state(config, manifest, shards)
    if (checkpoint := latest_checkpoint(run_dir / CHECKPOINTS)) is not None:
        restore_checkpoint(checkpoint, state)
    memory = MemoryConfig.parse(settings["memory"])
    clue = ClueObjective(state.model, config.optim.bag_steps, config.loss, memory, config.precision)
    objective = ray.train.torch.prepare_model(
        clue,
        # Blocks that the first steps leave out have no gradient there.
        parallel_strategy_kwargs={"find_unused_parameters": config.optim.bag_steps > 0},
    )
    pool = load_pool(shards, manifest.facts["shards"], config.views, "validation", config.pool_size)
    spool = MetricSpool(run_dir / SPOOL_NAME) if context.get_world_rank() == 0 else None

    stream = cast(ray.data.DataIterator, ray.train.get_dataset_shard("train"))
    batches = stream.iter_batches(
        batch_size=cast(int, None),  # whole blocks; Ray's annotation has forgotten its own None
        batch_format="pyarrow",
        prefetch_batches=PREFETCH_BATCHES,
    )
    waiting_since, is_first = time.perf_counter(), True
    for table in batches:
        batch = from_table(table)
        if batch.step != state.step:
            raise RuntimeError(f"the stream delivered step {batch.step} where step {state.step} is due")
        started = time.perf_counter()
        metrics = train_step(objective, state, batch, config.optim, config.num_steps)
        ended = time.perf_counter()
        if is_first:
            logger.info("%s, chunks of %d", clue.describe(), metrics["train/chunk_size"])
            is_first = False
        metrics["time/input_wait_s"] = started - waiting_since
        metrics["time/step_s"] = ended - started
        for what in ("users", "tokens"):
            metrics[f"train/{what}_per_s"] = metrics.pop(f"train/{what}") / (ended - started)
        is_last = state.step == config.num_steps
        if is_last or state.step % config.validate_every == 0:
            metrics |= validate(state.model, pool)
            if spool is not None:
                save_checkpoint(run_dir / CHECKPOINTS, state, settings["config"], metrics, config.keep_checkpoints)
            ray.train.report({"step": state.step, "val_loss": metrics["val/loss"]})
        if spool is not None:
            spool.write(state.step, int(time.time() * 1000), metrics, is_durable="val/loss" in metrics)
        waiting_since = time.perf_counter()


def build_state(config: PretrainConfig, manifest: Manifest, shards: Path) -> TrainState:
    """A freshly initialised model and optimizer; the same numbers in every process for the same seed."""
    torch.manual_seed(config.seed)
    model = Clue(config.model, manifest.facts["vocab_size"], torch.from_numpy(read_idf(shards)))
    return TrainState(model=model, optimizer=build_optimizer(model, config.optim))
