"""The first executor of a sweep: warm lanes side by side, each a group of workers that runs unit after unit."""

import os
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import ray
import torch

from pipelines.console import Console
from pipelines.session import ray_session
from pipelines.sweep_config import LanesConfig
from pipelines.sweep_lane import run_lane
from pipelines.sweep_plan import SweepPlan, Throughput, Unit, planned_row
from pipelines.sweep_queue import CellQueue, Priced
from userrep.config import ConfigError

POLL_INTERVAL_S = 1.0
TELL_INTERVAL_S = 60.0


def unit_values(plan: SweepPlan, unit: Unit, throughput: Throughput) -> dict[str, Any]:
    """What a lane needs to know of a unit, JSON-plain."""
    lanes, longest = plan.config.lanes, unit.cells[-1]
    seconds = plan.seconds_of(unit, throughput)
    sizes = f"N {longest.parameters['non_embedding']:,} S {longest.cell.max_events} B {longest.cell.global_batch_size}"
    return {
        "trunk_id": unit.trunk_id,
        "label": sizes,
        "config": plan.pretrain_config(longest.cell).model_dump(mode="json"),
        "model_share": longest.model_flops / longest.flops,
        "timeout_s": max(lanes.min_timeout_s, lanes.timeout_factor * seconds),
        "cells": [
            {
                "cell_id": planned.cell.cell_id,
                "cell": planned.cell.model_dump(mode="json"),
                "row": planned_row(planned, plan.config.name),
            }
            for planned in unit.cells
        ],
    }


def expected_lanes(lanes: LanesConfig, is_verbose: bool) -> int:
    """Lanes that the cluster which RAY_ADDRESS names has room for; without it, this machine, as what Ray would start.

    Raises:
        ConfigError: there is room for none.
    """
    if "RAY_ADDRESS" in os.environ:
        with ray_session(is_verbose):
            resources = ray.cluster_resources()
    else:
        resources = {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    return count_lanes(
        lanes.num_lanes,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        lanes.num_workers,
        lanes.threads,
        lanes.use_gpu,
    )


def count_lanes(plan_lanes: int, cpus: float, gpus: float, num_workers: int, threads: int, use_gpu: bool) -> int:
    """Lanes that a cluster has room for, at most as many as are wanted.

    Raises:
        ConfigError: for none.
    """
    room = int(cpus // (num_workers * threads))
    if use_gpu:
        room = min(room, int(gpus // num_workers))
    if room < 1:
        raise ConfigError(
            f"a lane of {num_workers} workers with {threads} CPUs{' and a GPU' if use_gpu else ''} each does not fit "
            f"into the cluster's {cpus:g} CPUs and {gpus:g} GPUs: lower lanes.num_workers or lanes.threads"
        )
    return min(plan_lanes or room, room)


def run_lanes(
    plan: SweepPlan,
    throughput: Throughput,
    max_hours: float | None,
    console: Console,
    units: list[Unit],
    tell: Callable[[], object],
) -> list[str]:
    """Runs units in lanes until the queue is empty; returns the cells that were passed over.

    Args:
        plan: of the sweep.
        throughput: that cells are priced by.
        max_hours: that it may take; cells that would not end in time are passed over.
        console: for progress.
        units: that are to be run.
        tell: is called now and then.

    Raises:
        ConfigError: the cluster has no room for a single lane.
        RuntimeError: all lanes have ended early.
    """
    priced = [Priced(unit_values(plan, unit, throughput), plan.seconds_of(unit, throughput)) for unit in units]
    if max_hours is not None and all(p.seconds > 3600 * max_hours for p in priced):  # nothing need be started
        return [cell_id for p in priced for cell_id in p.cell_ids]
    with ray_session(console.is_verbose):
        gflops = round(sum(map(plan.flops_of, units)) / 1e9)
        return _run(plan, priced, gflops, max_hours, console, tell)


def _run(
    plan: SweepPlan,
    priced: list[Priced],
    gflops: int,
    max_hours: float | None,
    console: Console,
    tell: Callable[[], object],
) -> list[str]:
    lanes, resources = plan.config.lanes, ray.cluster_resources()
    num_lanes = count_lanes(
        lanes.num_lanes,
        resources.get("CPU", 0),
        resources.get("GPU", 0),
        lanes.num_workers,
        lanes.threads,
        lanes.use_gpu,
    )
    num_lanes = min(num_lanes, len(priced))
    seconds = None if max_hours is None else 3600 * max_hours
    queue: Any = (
        cast(Any, ray.remote(CellQueue)).options(num_cpus=0).remote(plan.directory, priced, lanes.retries, seconds)
    )
    settings = {
        "directory": str(plan.directory),
        "shards": str(plan.shards),
        "job": uuid.uuid4().hex,
        "lanes": lanes.model_dump(mode="json"),
        "config": plan.config.model_dump(mode="json"),
        "num_units": len(priced),
    }
    start = cast(Any, ray.remote(run_lane)).options(num_cpus=0, max_retries=0)
    running = [start.remote(settings, queue, lane) for lane in range(num_lanes)]
    total = sum(len(p.cell_ids) for p in priced)
    looked_s = time.monotonic()
    with console.progress("sweep", "GFLOP") as advance:
        while running:
            over, running = ray.wait(running, num_returns=1, timeout=POLL_INTERVAL_S)
            for reason in ray.get(over):
                if reason:
                    console.say(f"sweep: a lane has ended: {reason}")
            status: dict[str, Any] = ray.get(queue.status.remote())
            done = round(status["share"] * gflops)
            advance(done, gflops, done, f"{status['finished']}/{total} cells {describe_lanes(status)}")
            if time.monotonic() - looked_s > TELL_INTERVAL_S:
                tell()
                looked_s = time.monotonic()
    status = ray.get(queue.status.remote())
    if status["waiting"]:
        raise RuntimeError(
            f"sweep: all lanes have ended with {status['waiting']} cells waiting; the same command goes on"
        )
    return status["passed_over"]


def describe_lanes(status: dict[str, Any]) -> str:
    """What every lane is at."""
    lanes = [
        f"[{lane['label']}: {lane['step']}/{lane['num_steps']} {lane['note']}]" for lane in status["lanes"].values()
    ]
    failed = f", {status['failed']} failed" if status["failed"] else ""
    return f"{' '.join(lanes)}{failed}"
