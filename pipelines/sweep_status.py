"""Tables about a sweep for people: what is planned and what it costs, and how a running one is getting on."""

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.sweep_cell import is_finished, read_row
from pipelines.sweep_plan import SWEEP, Budget, SweepPlan, Throughput
from pipelines.sweep_queue import FAILURE_NAME, STATUS_NAME
from userrep.config import ConfigError
from userrep.scaling.ladder import make_rung

GIB = 2**30
SILENCE_S = 300  # after which lanes count as dead; an evaluation says nothing for its minutes


def plan_table(plan: SweepPlan, throughput: Throughput) -> Table:
    """A line for each cell, in the order of the design."""
    table = Table(title=f"sweep {plan.config.name}: {len(plan.cells)} cells")
    for name in ("cell", "factor", "N", "samples", "S", "B", "steps", "rate", "FLOP", "padded", "GiB", "min", "state"):
        table.add_column(name, justify="left" if name in ("cell", "factor", "state") else "right", no_wrap=True)
    for planned in plan.cells:
        cell, size = planned.cell, planned.parameters["non_embedding"]
        finished = is_finished(plan.cell_directory(cell.cell_id))
        state = "finished" if finished else "" if plan.fits(planned) else "no memory"
        table.add_row(
            cell.cell_id,
            planned.factor,
            f"{size:,}",
            f"{cell.num_samples:,}",
            str(cell.max_events),
            f"{cell.global_batch_size:,}",
            f"{cell.num_steps:,}",
            f"{cell.learning_rate:.2g}",
            f"{planned.flops:.2e}",
            f"{planned.padded_flops / planned.flops:.0f}x",
            f"{planned.memory_bytes / GIB:.1f}",
            f"{throughput.seconds(size, planned.flops) / 60:.1f}",
            state,
        )
    return table


def plan_summary(plan: SweepPlan, throughput: Throughput, budget: Budget, num_lanes: int) -> str:
    """What the sweep costs, in words."""
    flops = [planned.flops for planned in plan.cells]
    decades = math.log10(max(flops) / min(flops))
    rates = ", ".join(
        f"{rate / 1e9:.1f} GFLOP/s at N = {size:,.0f}"
        for size, rate in zip(throughput.parameters, throughput.flops_per_s, strict=True)
    )
    lines = [
        f"{budget.num_cells} cells in {budget.num_units} trunks, {decades:.2f} decades of compute",
        f"{budget.flops:.3g} FLOP; cells that share a trunk save {budget.saved_flops:.3g}",
        f"{throughput.origin} throughput of a lane: {rates}",
        f"{budget.lane_hours:.2f} lane hours, about {budget.hours:.2f} hours with {num_lanes} lanes",
    ]
    if budget.cost is not None:
        lines.append(f"cost: {budget.cost:.2f}")
    if misfits := [planned.cell.cell_id for planned in plan.cells if not plan.fits(planned)]:
        limit = plan.memory_limit / GIB
        lines.append(f"do not fit into {limit:.1f} GiB of a worker and are left out: {', '.join(misfits)}")
    return "\n".join(lines)


def derivations(plan: SweepPlan) -> str:
    """How every size of the ladder came to be, with formulas and sources."""
    base, sizes = plan.config.job.clue.model, set[float]()
    for grid in plan.config.grids:
        sizes |= {*grid.parameters, *((grid.center.parameters,) if grid.center else ())}
    return "\n\n".join(make_rung(size, plan.config.ladder, base).describe() for size in sorted(sizes))


def read_status(workdir: Path) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Rows of all planned cells with what is known of each, and what the lanes said last; None: none has run.

    Raises:
        ConfigError: nothing was planned there.
    """
    directory = workdir / SWEEP
    if not (directory / "plan.json").is_file():
        raise ConfigError(f"{workdir} holds no sweep: pass the --workdir of `userrep sweep plan` or `run`")
    rows = []
    for row in json.loads((directory / "plan.json").read_text())["cells"]:
        cell = directory / "cells" / row["cell_id"]
        measured = read_row(cell)
        if measured is not None:
            row = row | measured
        elif (cell / FAILURE_NAME).is_file():
            row = row | {"status": "failed", "message": json.loads((cell / FAILURE_NAME).read_text())["message"]}
        rows.append(row)
    path = directory / STATUS_NAME
    return rows, json.loads(path.read_text()) if path.is_file() else None


def is_at_work(lanes: dict[str, Any]) -> bool:
    """Whether what the lanes said last is news; a sweep that was killed leaves lanes that say no more."""
    return bool(lanes["lanes"]) and time.time() - lanes["time_s"] < SILENCE_S


def status_table(rows: list[dict[str, Any]], lanes: dict[str, Any] | None) -> Table:
    """A line for each cell, those at work marked."""
    at_work = {lane["trunk_id"]: lane for lane in lanes["lanes"].values()} if lanes and is_at_work(lanes) else {}
    counts = {state: sum(row["status"] == state for row in rows) for state in ("finished", "failed", "planned")}
    title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    if lanes is not None and at_work:
        title += f"; by price, {lanes['left_s'] / 60:.0f} min left"
    table = Table(title=title)
    for name in ("cell", "factor", "N", "samples", "S", "B", "FLOP", "state", "loss", "recall@10", "GFLOP/s", "mfu"):
        table.add_column(name, justify="left" if name in ("cell", "factor", "state") else "right", no_wrap=True)
    for row in rows:
        lane = at_work.get(row["trunk_id"]) if row["status"] == "planned" else None
        state = f"{lane['step']}/{lane['num_steps']} {lane['note']}" if lane else row["status"]
        is_done = row["status"] == "finished"
        table.add_row(
            row["cell_id"],
            row["factor"],
            f"{row['parameters']:,}",
            f"{row['samples']:,}",
            str(row["max_events"]),
            f"{row['batch_size']:,}",
            f"{row['flops']:.2e}",
            state if not row["message"] else f"{state}: {row['message'][:60]}",
            f"{row['loss']:.4f}" if is_done else "",
            f"{row['recall_at_10']:.4f}" if is_done else "",
            f"{row['flops_per_s'] / 1e9:.1f}" if is_done else "",
            f"{row['mfu']:.2f}" if is_done else "",
        )
    return table
