"""The first executor of a sweep: warm lanes side by side, each a group of workers that runs unit after unit."""

import math
import os
import time
import uuid
from collections.abc import Callable
from typing import Any, cast

import psutil
import ray
import torch

from pipelines.console import Console
from pipelines.session import ray_session
from pipelines.sweep_config import LanesConfig
from pipelines.sweep_lane import run_lane
from pipelines.sweep_plan import Room, SweepPlan, Throughput, Unit, planned_row
from pipelines.sweep_queue import CellQueue, Priced
from userrep.config import ConfigError

POLL_INTERVAL_S = 1.0
TELL_INTERVAL_S = 60.0
USABLE_MEMORY = 0.8  # share of a machine's memory that lanes may fill


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


def find_room(lanes: LanesConfig, is_verbose: bool) -> Room:
    """What the cluster that RAY_ADDRESS names has for lanes; without it, this machine, as what Ray would start.

    Memory of a worker is that of the node with the least for each; with GPUs it is not limited, as theirs is another.

    Raises:
        ConfigError: there is room for no lane.
    """
    if "RAY_ADDRESS" in os.environ:
        with ray_session(is_verbose):
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    else:
        memory = float(psutil.virtual_memory().total)
        nodes = [{"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": memory}]
    num_lanes = count_lanes(
        lanes.num_lanes,
        sum(node["CPU"] for node in nodes),
        sum(node.get("GPU", 0) for node in nodes),
        lanes.num_workers,
        lanes.threads,
        lanes.use_gpu,
    )
    if lanes.use_gpu:
        return Room(num_lanes)
    most = num_lanes * lanes.num_workers  # workers that one node may get
    shares = [node["memory"] / max(1, min(most, node["CPU"] // lanes.threads)) for node in nodes if "memory" in node]
    return Room(num_lanes, USABLE_MEMORY * min(shares, default=math.inf))


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
    lane_of = {start.remote(settings, queue, lane): lane for lane in range(num_lanes)}
    running = list(lane_of)
    total = sum(len(p.cell_ids) for p in priced)
    looked_s = time.monotonic()
    with console.progress("sweep", "GFLOP") as advance:
        while running:
            over, running = ray.wait(running, num_returns=1, timeout=POLL_INTERVAL_S)
            for task in over:
                if reason := _reason(task):
                    console.say(f"sweep: lane {lane_of[task]} has ended: {reason}")
                ray.get(queue.left.remote(lane_of[task]))
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


def _reason(task: Any) -> str:
    """Why a lane ended early; empty: it did not. One that is lost takes no other one with it."""
    try:
        return ray.get(task)
    except ray.exceptions.RayError as error:
        return f"{type(error).__name__}: {error}"


def describe_lanes(status: dict[str, Any]) -> str:
    """What every lane is at."""
    lanes = [
        f"[{lane['label']}: {lane['step']}/{lane['num_steps']} {lane['note']}]" for lane in status["lanes"].values()
    ]
    failed = f", {status['failed']} failed" if status["failed"] else ""
    return f"{' '.join(lanes)}{failed}"
