"""Starts a run on Ray Train, and starts it again after failures. In the driver, and in Ray Train's controller."""

import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import DataConfig, FailureConfig, RunConfig, ScalingConfig

from userrep import storage
from userrep.data.stream import TrainingStream, execution_options
from userrep.models.clue import count_parameters
from userrep.training import loop
from userrep.training.checkpoint import CHECKPOINTS, checkpoint_step, latest_checkpoint, recover_checkpoint
from userrep.training.fence import Attempt, StaleAttemptError, last_failure, patiently, start_attempt, take_over
from userrep.training.preflight import (
    check_disk,
    check_gpus,
    check_memory,
    check_storage,
    inspect_nodes,
    reserve_cpus,
)
from userrep.training.settings import PretrainConfig, WorkersConfig, check_batch_divides, open_training_stream
from userrep.training.systems import open_system

RAY_DIR = "ray"  # in the run directory; what Ray Train insists on writing
START_FAILURES = 10  # each after a minute in which the cluster had no room for the workers


class TrainingError(RuntimeError):
    """A worker failed, again and again; the message names the first worker's exception."""


def train(shards: Path, run_dir: Path, config: PretrainConfig, workers: WorkersConfig) -> None:
    """Runs (or resumes) a pretraining run to its last step; checkpoints and metrics are left in `run_dir`.

    Args:
        shards: tokenized shards, absolute path that all nodes share, or a mirror.
        run_dir: absolute path that all nodes share, or a mirror; one run config only.
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
    resources = _preflight(stream.directories, run_dir, config, workers)
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
    name = f"attempt-{time.time_ns()}"
    trainer = _make_trainer(settings, run_dir, name, workers, stream, resources)
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _explain(error) from error
    finally:
        with suppress(OSError):  # it may still be written to
            storage.remove(run_dir / RAY_DIR / name)
    if result.return_value is not None:
        raise TrainingError(str(result.return_value))


def _explain(error: Exception) -> Exception:
    """What a failure of Ray Train means to the caller of `train`."""
    if isinstance(error, ray.train.WorkerGroupError):
        failures = [(f"worker {rank_} failed", cause) for rank_, cause in sorted(error.worker_failures.items())]
    else:
        failures = [("the workers could not be started", getattr(error, "controller_failure", error))]
    own = [cause for _, cause in failures if isinstance(cause, StaleAttemptError | TrainingError)]
    return own[0] if own else TrainingError("{}: {}".format(*failures[0]))


def _make_trainer(
    settings: dict[str, Any],
    run_dir: Path,
    name: str,
    workers: WorkersConfig,
    stream: TrainingStream,
    resources: dict[str, Any],
) -> ray.train.torch.TorchTrainer:
    return ray.train.torch.TorchTrainer(
        loop.train_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(num_workers=workers.num_workers, use_gpu=workers.use_gpu, **resources),
        torch_config=ray.train.torch.TorchConfig(timeout_s=loop.START_TIMEOUT_S),
        # A name of its own for every call: Ray Train must not restore anything, the run's own checkpoints do.
        run_config=RunConfig(
            name=name,
            **storage.for_ray(run_dir / RAY_DIR),
            # Ray Train counts all failures of a run, however long it is; those in a row are counted by `_Starter`.
            failure_config=FailureConfig(
                max_failures=-1 if workers.max_failures else 0, controller_failure_limit=START_FAILURES
            ),
        ),
        datasets={"train": cast(Any, _Starter(run_dir, settings["job"], workers.max_failures))},
        dataset_config=_Dealer(stream),
    )


def _preflight(
    sources: tuple[Path, ...], run_dir: Path, config: PretrainConfig, workers: WorkersConfig
) -> dict[str, Any]:
    """Refuses what cannot run here. Returns what each worker reserves, as arguments of `ScalingConfig`."""
    fewest, most = workers.bounds
    with torch.device("meta"):
        num_parameters = count_parameters(open_system(config, sources[0]).build_model())["total"]
    nodes = inspect_nodes(run_dir, sources)
    check_storage(run_dir, sources, nodes)
    check_gpus(fewest, ray.cluster_resources().get("GPU", 0), workers.use_gpu)
    check_memory(num_parameters, workers.memory.budget_mib, fewest, nodes, workers.use_gpu)
    check_disk(num_parameters, config.keep_checkpoints, run_dir)
    cpus, strategy = reserve_cpus(most, [node.num_cpus for node in nodes])
    return {"resources_per_worker": {"CPU": cpus}, "placement_strategy": strategy}


class _Starter:
    """Starts attempts. Ray Train's controller calls it before every start of a worker group."""

    def __init__(self, run_dir: Path, job: str, max_failures: int) -> None:
        """Args: max_failures: attempts that may end in a row without a new checkpoint; -1: any number."""
        self._run_dir, self._job, self._max_failures = run_dir, job, max_failures
        self._failures = 0
        self._before: Attempt | None = None

    def __call__(self) -> int:
        """Starts an attempt.

        Returns:
            The step at which the attempt starts.

        Raises:
            StaleAttemptError: another job has the run.
            TrainingError: too many attempts in a row have ended without a new checkpoint.
        """
        # Read by the controller, in whose process this runs: a worker that is lost cannot leave its process group in
        # order.
        os.environ["TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S"] = "2"
        checkpoints = self._run_dir / CHECKPOINTS

        def choose_checkpoint() -> str | None:
            found = recover_checkpoint(checkpoints)
            return found.name if found else None

        attempt = patiently(lambda: start_attempt(self._run_dir, self._job, choose_checkpoint))
        self._count(attempt)
        return checkpoint_step(checkpoints / attempt.checkpoint if attempt.checkpoint else None)

    def _count(self, attempt: Attempt) -> None:
        before, self._before = self._before, attempt
        had_begun = before is not None and before.end()  # else the cluster had no room for it
        if before is None or attempt.checkpoint != before.checkpoint:
            self._failures = 0
        elif had_begun:
            self._failures += 1
        if self._failures > self._max_failures >= 0:
            raise TrainingError(
                f"{self._failures} attempts in a row have ended before a new checkpoint (workers.max_failures="
                f"{self._max_failures}); the last one: {last_failure(self._run_dir)}"
            )


class _Dealer(DataConfig):
    """Deals a stream to as many workers as a group has: Ray Train tells their number nowhere else in time."""

    def __init__(self, stream: TrainingStream) -> None:
        super().__init__(datasets_to_split=["train"], execution_options=execution_options())
        self._stream = stream

    def configure(
        self, datasets: dict[str, Any], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Called once per start of a worker group; what `_Starter` returned stands in the place of a dataset."""
        dataset = self._stream.dataset(world_size, start_step=datasets["train"])
        return super().configure({"train": dataset}, world_size, worker_handles, worker_node_ids, **kwargs)
