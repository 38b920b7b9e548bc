"""What a table of runs says of a sweep: its places with one loss each, and how many cells made them.

A place is a point of the design. Cells of one place differ in seed and learning rate; its loss is the mean over seeds
at the best learning rate.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from userrep.schema import RUNS

FACTOR_COLUMNS = {"N": "parameters", "D": "samples", "S": "max_events", "B": "batch_size"}
ARMS = {"N": "model", "D": "samples", "S": "history", "B": "batch"}  # factor -> its arm of a star
# Cells that agree in these differ in seed and learning rate only.
PLACE_COLUMNS = (
    "parameters",
    "embedding_parameters",
    "dim",
    "item_layers",
    "service_layers",
    "samples",
    "user_share",
    "max_events",
    "batch_size",
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """A point of the design and what was measured there.

    Attributes:
        cell_id: of its cell with the best learning rate; of the first seed.
        factor: arm of the design.
        factors: N, D, S, B.
        compute: C, operations of one run.
        loss: mean over seeds at the best learning rate.
        num_seeds: runs in that mean.
        learning_rate_factor: the best, times the ladder's rates.
        num_rates: learning rates that were tried.
        recalls: `recall_at_1`, `recall_at_10`; mean over the same runs.
        downstream_losses: by task, likewise.
        downstream_scores: by task, likewise.
    """

    cell_id: str
    factor: str
    factors: dict[str, float]
    compute: float
    loss: float
    num_seeds: int
    learning_rate_factor: float
    num_rates: int
    recalls: dict[str, float]
    downstream_losses: dict[str, float]
    downstream_scores: dict[str, float]


@dataclass(frozen=True)
class SweepFacts:
    """How a sweep was run.

    Attributes:
        sweep: its name.
        num_planned: cells without a result yet.
        num_finished: cells with one.
        num_failed: cells that failed.
        failures: reasons of failures, each with how often, the commonest first.
        flops: operations of all finished cells; steps that cells share are counted for each.
        hours: of training and evaluation of finished cells, likewise.
        flops_per_s: median over finished cells; None where it was not measured.
        decades: of compute among the places.
        pool_size: users among which a loss was measured; None without finished cells.
        seed_noise: standard deviation of log loss between seeds of a place; None without repeated places.
        devices: that cells ran on.
        code_versions: of the package.
        left_out: why finished cells are not used, one sentence each.
    """

    sweep: str
    num_planned: int
    num_finished: int
    num_failed: int
    failures: tuple[tuple[str, int], ...]
    flops: float
    hours: float
    flops_per_s: float | None
    decades: float
    pool_size: int | None
    seed_noise: float | None
    devices: tuple[str, ...]
    code_versions: tuple[str, ...]
    left_out: tuple[str, ...]


def read_runs(runs: pa.Table) -> tuple[SweepFacts, tuple[Place, ...]]:
    """Facts of a sweep and its places, the cheapest first.

    Args:
        runs: of the schema RUNS; may hold no finished cell.

    Raises:
        ValueError: columns are missing.
    """
    if missing := [name for name in RUNS.names if name not in runs.column_names]:
        raise ValueError(f"the table of runs lacks the columns {missing}: give a table of the schema RUNS")
    rows = runs.to_pylist()
    finished = [row for row in rows if row["status"] == "finished"]
    used, left_out = _comparable(finished)
    groups = defaultdict[tuple[Any, ...], list[Row]](list)
    for row in used:
        groups[tuple(row[name] for name in PLACE_COLUMNS)].append(row)
    best = [_best_rate(group) for group in groups.values()]
    pairs = zip(best, groups.values(), strict=True)
    places = sorted((_place(rows, group) for rows, group in pairs), key=lambda place: place.compute)
    return _facts(rows, finished, used, best, places, left_out), tuple(places)


def _comparable(finished: Sequence[Row]) -> tuple[list[Row], tuple[str, ...]]:
    """Cells whose losses are numbers and were measured among equally many users."""
    measured = [row for row in finished if _is_positive(row["loss"]) and _is_positive(row["flops"])]
    notes = []
    if bad := len(finished) - len(measured):
        notes.append(f"{bad} finished cells are left out: their loss is not a positive number")
    pools = Counter(row["pool_size"] for row in measured)
    if len(pools) > 1:
        kept = pools.most_common(1)[0][0]
        notes.append(
            f"{len(measured) - pools[kept]} finished cells are left out: their loss was not measured among a pool of "
            f"{kept} users, as most were, and losses among different pools cannot be compared"
        )
        measured = [row for row in measured if row["pool_size"] == kept]
    return measured, tuple(notes)


def _best_rate(group: Sequence[Row]) -> list[Row]:
    """The runs at the learning rate of the lowest mean loss, by seed."""
    by_rate = defaultdict[float, list[Row]](list)
    for row in group:
        by_rate[row["learning_rate_factor"]].append(row)
    best = min(by_rate.values(), key=lambda rows: _mean(rows, "loss"))
    return sorted(best, key=lambda row: row["seed"])


def _place(best: Sequence[Row], group: Sequence[Row]) -> Place:
    labels = [row["factor"] for row in group]
    recalls = ("recall_at_1", "recall_at_10")
    return Place(
        cell_id=best[0]["cell_id"],
        factor="center" if "center" in labels else labels[0],
        factors={name: float(best[0][column]) for name, column in FACTOR_COLUMNS.items()},
        compute=_mean(best, "flops"),
        loss=_mean(best, "loss"),
        num_seeds=len(best),
        learning_rate_factor=best[0]["learning_rate_factor"],
        num_rates=len({row["learning_rate_factor"] for row in group}),
        recalls=_mean_by_name([{name: row[name] for name in recalls if row[name] is not None} for row in best]),
        downstream_losses=_mean_by_name([dict(row["downstream_losses"] or ()) for row in best]),
        downstream_scores=_mean_by_name([dict(row["downstream_scores"] or ()) for row in best]),
    )


def _facts(
    rows: Sequence[Row],
    finished: Sequence[Row],
    used: Sequence[Row],
    best: Sequence[Sequence[Row]],
    places: Sequence[Place],
    left_out: tuple[str, ...],
) -> SweepFacts:
    status = Counter(row["status"] for row in rows)
    failures = Counter(row["message"] for row in rows if row["status"] == "failed")
    rates = [row["flops_per_s"] for row in finished if row["flops_per_s"]]
    compute = [place.compute for place in places]
    return SweepFacts(
        sweep=", ".join(sorted({row["sweep"] for row in rows})),
        num_planned=status["planned"],
        num_finished=len(finished),
        num_failed=status["failed"],
        failures=tuple(failures.most_common()),
        flops=float(sum(row["flops"] for row in finished)),
        hours=sum((row["train_s"] or 0.0) + (row["evaluate_s"] or 0.0) for row in finished) / 3600,
        flops_per_s=float(np.median(rates)) if rates else None,
        decades=math.log10(max(compute) / min(compute)) if compute else 0.0,
        pool_size=used[0]["pool_size"] if used else None,
        seed_noise=_seed_noise(best),
        devices=tuple(sorted({row["device"] for row in finished if row["device"]})),
        code_versions=tuple(sorted({row["code_version"] for row in finished if row["code_version"]})),
        left_out=left_out,
    )


def _seed_noise(best: Sequence[Sequence[Row]]) -> float | None:
    """Pooled over the places that have several seeds."""
    logs = [np.log([row["loss"] for row in rows]) for rows in best if len(rows) > 1]
    if not logs:
        return None
    squares = sum(float(((values - values.mean()) ** 2).sum()) for values in logs)
    return math.sqrt(squares / sum(len(values) - 1 for values in logs))


def _is_positive(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0


def _mean(rows: Sequence[Row], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _mean_by_name(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of the names that all have, with finite values."""
    shared = [name for name in scores[0] if all(math.isfinite(one.get(name, math.nan)) for one in scores)]
    return {name: float(np.mean([one[name] for one in scores])) for name in shared}
