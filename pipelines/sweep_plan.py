"""What a sweep would run, and its price in operations, seconds, memory and money, before anything starts."""

import json
import math
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field

from pipelines.sweep_config import SweepConfig
from userrep.config import Config, ConfigError, digest_json
from userrep.manifest import read_manifest, write_json
from userrep.scaling.grid import Cell, PlannedCell, SweepBase, plan_cells
from userrep.scaling.workload import TableWorkloads, read_samples
from userrep.training.objective import ClueObjective
from userrep.training.optim import decay_start
from userrep.training.settings import CluePretraining, open_training_stream
from userrep.training.state import train_step
from userrep.training.systems import build_state

SWEEP = "sweep"  # directory of a sweep in its working directory
THROUGHPUT_NAME = "throughput.json"
BATCHES_READ = 4  # as many samples as so many of the largest batches are read to price steps
TRIAL_S = 12.0  # of steps that throughput is measured on, per size; two steps at the least
PROCESS_BYTES = 2**30  # of a worker beside what the step holds: torch, Ray, the pool of the evaluation
EVALUATION_S = 15.0  # assumption, until the first cell has been evaluated


class Throughput(Config):
    """Operations per second of a lane, by the size of the model: small matrices are slower.

    Attributes:
        parameters: non-embedding parameters of the models that were measured, ascending.
        flops_per_s: of each, > 0.
        origin: measured, or given.
        lanes: digest of the settings of lanes under which they were measured; empty: given.
    """

    parameters: tuple[float, ...] = Field(min_length=1)
    flops_per_s: tuple[float, ...] = Field(min_length=1)
    origin: str
    lanes: str = ""

    def seconds(self, parameters: float, flops: float) -> float:
        """Of so many operations with a model of that size; between measured sizes by their logarithms."""
        return flops / float(np.interp(np.log(parameters), np.log(self.parameters), self.flops_per_s))


@dataclass(frozen=True)
class Unit:
    """Cells that share a trunk: what a lane takes at a time.

    Attributes:
        trunk_id: of all of them.
        cells: ascending by their number of steps.
    """

    trunk_id: str
    cells: tuple[PlannedCell, ...]

    def without(self, done: set[str]) -> "Unit":
        """The same with some cells left out, which may be all."""
        return Unit(self.trunk_id, tuple(p for p in self.cells if p.cell.cell_id not in done))

    def steps_of(self, optim: Any) -> int:
        """Steps that are taken: those of the longest cell, and the decays of the others."""
        steps = [planned.cell.num_steps for planned in self.cells]
        return steps[-1] + sum(n - decay_start(n, optim) for n in steps[:-1])


@dataclass(frozen=True)
class SweepPlan:
    """A planned sweep.

    Attributes:
        config: of it.
        directory: where its cells are kept.
        shards: tokenized table.
        cells: in the order of the design; those that do not fit into memory included.
        memory_limit: bytes that a worker may need.
    """

    config: SweepConfig
    directory: Path
    shards: Path
    cells: tuple[PlannedCell, ...]
    memory_limit: float

    @cached_property
    def units(self) -> list[Unit]:
        """Trunks of the cells that fit, the most expensive first."""
        trunks = defaultdict[str, list[PlannedCell]](list)
        for planned in self.cells:
            if self.fits(planned):
                trunks[planned.cell.trunk_id].append(planned)
        units = [
            Unit(trunk_id, tuple(sorted(cells, key=lambda p: p.cell.num_steps))) for trunk_id, cells in trunks.items()
        ]
        return sorted(units, key=lambda unit: -self.flops_of(unit))

    def fits(self, planned: PlannedCell) -> bool:
        """Whether a worker has the memory for it."""
        return planned.memory_bytes + PROCESS_BYTES <= self.memory_limit

    def flops_of(self, unit: Unit) -> float:
        """Operations that are computed for a unit: its cells share most of theirs."""
        longest = unit.cells[-1]
        return unit.steps_of(self.config.job.clue.optim) * longest.flops / longest.cell.num_steps

    def seconds_of(self, unit: Unit, throughput: Throughput) -> float:
        """Of a unit in a lane."""
        parameters = unit.cells[-1].parameters["non_embedding"]
        return throughput.seconds(parameters, self.flops_of(unit)) + EVALUATION_S * len(unit.cells)

    def pretrain_config(self, cell: Cell) -> CluePretraining:
        """Config of the run of a cell."""
        return self.config.job.clue.with_overrides(cell.overrides())

    def cell_directory(self, cell_id: str) -> Path:
        """Where a cell is kept."""
        return self.directory / "cells" / cell_id


@dataclass(frozen=True)
class Room:
    """What a cluster has for lanes: how many, and memory in bytes for each of their workers."""

    num_lanes: int = 1
    memory_bytes: float = math.inf


def make_plan(config: SweepConfig, shards: Path, workdir: Path, room: Room) -> SweepPlan:
    """Plans a sweep on a tokenized table.

    Args:
        config: of it.
        shards: the table.
        workdir: of the sweep.
        room: that there is for lanes.

    Raises:
        ConfigError: the design does not fit itself, the ladder or the data.
    """
    manifest, pretrain = read_manifest(shards), config.job.clue
    facts, kinds = manifest.facts, pretrain.views.kinds
    total = sum(g["samples"]["train"][kind] for s in facts["shards"] for g in s["row_groups"] for kind in kinds)
    try:
        centers = [grid.center.batch_size for grid in config.grids if grid.center]
        largest = max(2048, *centers, *(size for grid in config.grids for size in grid.batch_sizes))
        group, samples = read_samples(shards, facts["shards"], kinds, BATCHES_READ * largest)
        base = SweepBase(
            # What cells replace is in the hash too: another base is another sweep.
            config_hash=digest_json(
                {
                    "pretrain": pretrain.model_dump(mode="json"),
                    "evaluation": config.evaluation.model_dump(mode="json"),
                    "data": manifest.digest(),
                }
            ),
            model=pretrain.model,
            vocab_size=facts["vocab_size"],
            num_samples=total,
            workload_of=TableWorkloads(
                group,
                samples,
                facts["vocab_size"],
                pretrain.augment,
                pretrain.loss,
                config.lanes.memory,
                pretrain.precision,
            ),
        )
        cells: dict[str, PlannedCell] = {}
        for grid in config.grids:
            for planned in plan_cells(grid, config.ladder, base):
                cells.setdefault(planned.cell.cell_id, planned)
    except ValueError as error:
        raise ConfigError(f"sweep {config.name}: {error}") from error
    return SweepPlan(config, workdir / SWEEP, shards, tuple(cells.values()), room.memory_bytes)


def planned_row(planned: PlannedCell, sweep: str) -> dict[str, Any]:
    """What the table of runs says of a cell that has not been run."""
    cell = planned.cell
    return {
        "cell_id": cell.cell_id,
        "trunk_id": cell.trunk_id,
        "sweep": sweep,
        "factor": planned.factor,
        "status": "planned",
        "message": "",
        "parameters": planned.parameters["non_embedding"],
        "embedding_parameters": planned.parameters["embedding"],
        "dim": cell.model.dim,
        "item_layers": cell.model.item_layers,
        "service_layers": cell.model.service_layers,
        "samples": cell.num_samples,
        "user_share": cell.user_share,
        "epochs": planned.epochs,
        "max_events": cell.max_events,
        "batch_size": cell.global_batch_size,
        "num_steps": cell.num_steps,
        "learning_rate": cell.learning_rate,
        "embedding_learning_rate": cell.embedding_learning_rate,
        "learning_rate_factor": planned.learning_rate_factor,
        "seed": cell.seed,
        "flops": planned.flops,
        "padded_flops": planned.padded_flops,
        "tokens": planned.tokens,
    }


def throughput_of(plan: SweepPlan, given: float | None = None) -> Throughput:
    """What a lane computes per second: given, or measured once per sweep on the smallest, middle and largest model.

    Args:
        plan: of the sweep.
        given: operations per second, of another machine for example.
    """
    if given is not None:
        return Throughput(parameters=(1.0,), flops_per_s=(given,), origin="given")
    path, lanes = plan.directory / THROUGHPUT_NAME, plan.config.lanes
    if lanes.use_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "lanes.use_gpu=true, and this machine has no GPU to measure throughput on: give --flops-per-s of a lane"
        )
    digest = digest_json([lanes.model_dump(mode="json", exclude={"num_lanes"}), plan.config.job.clue.precision])
    if path.is_file() and (known := Throughput.parse(json.loads(path.read_text()))).lanes == digest:
        return known
    by_size = {p.parameters["non_embedding"]: p for p in plan.cells if plan.fits(p)}
    sizes = sorted(by_size)
    chosen = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]}) if sizes else []
    if not chosen:
        raise ConfigError("no cell of the sweep fits into this machine's memory: use smaller models or fewer lanes")
    rates = tuple(_measure(plan, by_size[size]) for size in chosen)
    found = Throughput(parameters=tuple(map(float, chosen)), flops_per_s=rates, origin="measured", lanes=digest)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found.model_dump(mode="json"))
    return found


def _measure(plan: SweepPlan, planned: PlannedCell) -> float:
    """Operations per second of a lane, by a few steps of a cell in this process, times the workers of the lane."""
    config, lanes = plan.pretrain_config(planned.cell), plan.config.lanes
    before = torch.get_num_threads()
    torch.set_num_threads(lanes.threads)
    try:
        state = build_state(config, plan.shards)
        state.model.to("cuda" if lanes.use_gpu else "cpu")
        objective = ClueObjective(state.model, 0, config.loss, lanes.memory, config.precision)
        ends: list[float] = []
        for batch in open_training_stream(plan.shards, config, max(3, config.num_steps)).batches():
            train_step(objective, state, batch, config.optim, config.num_steps)
            ends.append(time.perf_counter())
            if len(ends) > 2 and ends[-1] - ends[0] > TRIAL_S:
                break
        # The first step also plans memory and touches pages for the first time.
        # A step ends with numbers that are read from the device, so its time is that of the device too.
        per_worker = planned.flops / planned.cell.num_steps * (len(ends) - 1) / (ends[-1] - ends[0])
        return lanes.num_workers * per_worker
    finally:
        torch.set_num_threads(before)


class Budget(Config):
    """What the user is told before a sweep starts, and what it costs."""

    num_cells: int
    num_units: int
    flops: float
    saved_flops: float  # operations that cells share
    lane_hours: float
    hours: float
    cost: float | None = None

    @classmethod
    def of(cls, plan: SweepPlan, throughput: Throughput, num_lanes: int, price: float | None) -> Self:
        """Args: price is of a lane's hour, in any currency."""
        seconds = [plan.seconds_of(unit, throughput) for unit in plan.units]
        loads = [0.0] * max(1, num_lanes)
        for value in seconds:  # the largest first, each to the lane that is free first
            loads[loads.index(min(loads))] += value
        alone = sum(planned.flops for unit in plan.units for planned in unit.cells)
        flops = sum(map(plan.flops_of, plan.units))
        hours = sum(seconds) / 3600
        return cls(
            num_cells=sum(len(unit.cells) for unit in plan.units),
            num_units=len(plan.units),
            flops=flops,
            saved_flops=alone - flops,
            lane_hours=hours,
            hours=max(loads) / 3600,
            cost=None if price is None else hours * price,
        )
