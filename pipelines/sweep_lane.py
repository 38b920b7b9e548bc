"""A lane: workers that Ray Train starts once, and that run unit after unit until the queue has no more."""

import faulthandler
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig

from pipelines.sweep_cell import UnitRun, peak_flops_per_s, run_unit
from pipelines.sweep_config import LanesConfig, SweepConfig
from userrep.losses.gather import rank, world_size
from userrep.scaling.grid import Cell
from userrep.training.cell_evaluation import CellEvaluation
from userrep.training.fence import Attempt, start_attempt, take_over
from userrep.training.objective import ClueObjective
from userrep.training.settings import CluePretraining
from userrep.training.state import NonFiniteLossError
from userrep.training.systems import build_state

COLLECTIVE_TIMEOUT_S = 3600  # others wait while the first measures; what hangs is ended by the time-out of its unit
MAX_STARTS = 10  # of a lane for which the cluster has no room; each takes a minute
BEAT_INTERVAL_S = 1.0


def run_lane(settings: dict[str, Any], queue: Any, lane: int) -> str:
    """Runs a lane to its end. Returns why it ended early; empty: the queue has no more for it."""
    config = LanesConfig.parse(settings["lanes"])
    name = f"lane-{lane}-{time.time_ns()}"  # one of its own: Ray Train must not restore anything
    trainer = ray.train.torch.TorchTrainer(
        work,
        train_loop_config={**settings, "queue": queue, "lane": lane},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.threads, **({"GPU": 1} if config.use_gpu else {})},
        ),
        torch_config=ray.train.torch.TorchConfig(timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(settings["directory"]) / "ray"),
            failure_config=FailureConfig(
                max_failures=settings["num_units"] * (config.retries + 1) + 1, controller_failure_limit=MAX_STARTS
            ),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        return str(next(iter(failures.values()), error))
    finally:
        shutil.rmtree(Path(settings["directory"]) / "ray" / name, ignore_errors=True)
    return ""


def work(settings: dict[str, Any]) -> None:
    """What every worker of a lane runs."""
    queue, lane, lanes = settings["queue"], settings["lane"], LanesConfig.parse(settings["lanes"])
    torch.set_num_threads(lanes.threads)
    device = ray.train.torch.get_device()
    config, shards = SweepConfig.parse(settings["config"]), Path(settings["shards"])
    pretrain = config.job.pretrain
    evaluation = CellEvaluation(shards, config.evaluation, pretrain.views) if rank() == 0 else None
    peak = world_size() * peak_flops_per_s(device, pretrain.precision)
    while (unit := _claim(queue, lane)) is not None:
        faulthandler.dump_traceback_later(unit["timeout_s"], exit=True, file=2)
        try:
            _run(unit, settings, lanes, device, evaluation, peak)
        except NonFiniteLossError as error:  # on every rank; it would come again
            if rank() == 0:
                ray.get(queue.failed.remote(lane, f"diverged: {error}", True))
        except Exception as error:  # the group is started again, and the queue decides whether the unit is
            ray.get(queue.explain.remote(lane, f"rank {rank()}: {type(error).__name__}: {error}"))
            raise
        else:
            if rank() == 0:
                ray.get(queue.done.remote(lane))
        finally:
            faulthandler.cancel_dump_traceback_later()


def _claim(queue: Any, lane: int) -> dict[str, Any] | None:
    """The next unit, the same on every rank."""
    found = [json.dumps(ray.get(queue.claim.remote(lane))) if rank() == 0 else ""]
    if world_size() > 1:
        dist.broadcast_object_list(found, src=0)
    return json.loads(found[0])


def _run(
    unit: dict[str, Any],
    settings: dict[str, Any],
    lanes: LanesConfig,
    device: torch.device,
    evaluation: CellEvaluation | None,
    peak: float,
) -> None:
    queue, lane, directory = settings["queue"], settings["lane"], Path(settings["directory"])
    cells = tuple(Cell.parse(cell["cell"]) for cell in unit["cells"])
    config, shards = CluePretraining.parse(unit["config"]), Path(settings["shards"])
    trunk = directory / "trunks" / unit["trunk_id"]
    state = build_state(config, shards)
    state.model.to(device)
    objective = ray.train.torch.prepare_model(
        ClueObjective(state.model, 0, config.loss, lanes.memory, config.precision)
    )
    run = UnitRun(
        cells=cells,
        rows={cell["cell_id"]: cell["row"] for cell in unit["cells"]},
        model_share=unit["model_share"],
        directory=directory,
        config=config,
        shards=shards,
        attempt=_attempt(trunk, settings["job"]) if rank() == 0 else None,
        peak_flops_per_s=peak,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        checkpoint_s=lanes.checkpoint_s,
        fork=trunk / "fork",
    )
    run_unit(run, state, objective, evaluation, _beat(queue, lane), _committed(queue, lane))


def _attempt(trunk: Path, job: str) -> Attempt:
    take_over(trunk, job)
    return start_attempt(trunk, job, lambda: None)


def _beat(queue: Any, lane: int) -> Callable[[int, int, float], None]:
    last_s = 0.0

    def beat(step: int, num_steps: int, loss: float) -> None:
        nonlocal last_s
        if rank() == 0 and time.monotonic() - last_s > BEAT_INTERVAL_S:
            last_s = time.monotonic()
            queue.beat.remote(lane, step, num_steps, f"loss {loss:.3f}")

    return beat


def _committed(queue: Any, lane: int) -> Callable[[str], None]:
    def committed(cell_id: str) -> None:
        if rank() == 0:
            ray.get(queue.finished.remote(lane, cell_id))

    return committed
