"""Cells of a sweep: full, star and IsoFLOP designs over model, samples, history length, batch, and compute.

A cell holds every value in which runs of a sweep differ, resolved; its id is their hash. So a cell keeps its id
whichever design it is planned by, and a finished cell is recognised by it.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from userrep.config import Config
from userrep.models.clue import ClueConfig
from userrep.models.cost import parameter_counts, step_cost
from userrep.scaling.ladder import derive_learning_rates, make_rung
from userrep.scaling.rules import LadderConfig
from userrep.scaling.workload import Workload, WorkloadOf

ISOFLOP_TOLERANCE = 0.02  # between a cell's operations and its budget, which a whole number of steps has to meet

Factor = Literal["model", "samples", "history", "batch", "center", "grid", "budget"]


class Cell(Config):
    """One run."""

    base: str  # content hash of the config whose values the cell replaces: data, views, loss
    model: ClueConfig
    global_batch_size: int = Field(ge=2)
    num_steps: int = Field(ge=1)
    max_events: int = Field(ge=1)  # history length: most events of a view
    user_share: float = Field(default=1.0, gt=0, le=1)  # of the training samples, `CluePretraining.user_share`
    learning_rate: float = Field(gt=0)
    embedding_learning_rate: float = Field(gt=0)
    seed: int = 0

    @property
    def cell_id(self) -> str:
        """Stable id: hash of all values."""
        return self.content_hash()

    @property
    def trunk_id(self) -> str:
        """Equal for cells that differ in their duration alone: one run at a constant rate has them on its way."""
        return self.model_copy(update={"num_steps": 1}).content_hash()

    @property
    def num_samples(self) -> int:
        """Samples that the run sees."""
        return self.global_batch_size * self.num_steps

    def overrides(self) -> list[str]:
        """Assignments to a pretraining config.

        Cells have no steps without blocks, so that all steps of a run cost the same.
        """
        values = {f"model.{name}": value for name, value in self.model.model_dump().items()} | {
            "views.max_events": self.max_events,
            "augment.max_events": self.max_events,
            "global_batch_size": self.global_batch_size,
            "num_steps": self.num_steps,
            "user_share": self.user_share,
            "optim.learning_rate": self.learning_rate,
            "optim.embedding_learning_rate": self.embedding_learning_rate,
            "optim.bag_steps": 0,
            "seed": self.seed,
        }
        return [f"{name}={value}" for name, value in values.items()]


class Center(Config):
    """Where the arms of a star meet: what the other factors are held at."""

    parameters: PositiveFloat
    samples: PositiveInt
    max_events: PositiveInt
    batch_size: int = Field(ge=2)


class GridConfig(Config):
    """A design.

    `full`: every combination of the levels; samples and batches that are not given are the ladder's.
    `star`: the center, and for each factor the levels with the others at the center.
    `isoflop`: for every budget and combination of the levels, as many steps as the budget pays for.
    """

    design: Literal["full", "star", "isoflop"]
    parameters: tuple[PositiveFloat, ...] = ()  # non-embedding parameters, the ladder's dial
    samples: tuple[PositiveInt, ...] = ()  # seen by a run, over all epochs
    max_events: tuple[PositiveInt, ...] = ()  # of a view: history length
    batch_sizes: tuple[PositiveInt, ...] = ()
    budgets: tuple[PositiveFloat, ...] = ()  # operations of a run; isoflop
    center: Center | None = None  # star
    learning_rate_factors: tuple[PositiveFloat, ...] = (1.0,)  # times the ladder's rates; several: to measure its rule
    seeds: tuple[int, ...] = (0,)
    # nested: a run of fewer samples sees fewer users, a subset of those of a larger run, and each of them `epochs`
    # times as long as there are enough. all: every run draws from all users.
    users: Literal["nested", "all"] = "nested"
    epochs: float = Field(default=1.0, gt=0)


@dataclass(frozen=True)
class SweepBase:
    """What all cells of a sweep share.

    Attributes:
        config_hash: of the config whose values cells replace.
        model: encoder whose longest item and initialisation are kept.
        vocab_size: tokens of the tokenizer.
        num_samples: training samples of the whole table, each counted once.
        workload_of: a step of a cell, before it is run.
    """

    config_hash: str
    model: ClueConfig
    vocab_size: int
    num_samples: int
    workload_of: WorkloadOf


@dataclass(frozen=True)
class PlannedCell:
    """A cell and its price.

    Attributes:
        cell: what will run.
        factor: which arm of the star it is on; `center`, or `grid` and `budget` in the other designs.
        flops: operations of the whole run, over unique real tokens.
        model_flops: of them, without what is computed twice.
        padded_flops: what a padded implementation would need.
        parameters: as `count_parameters` gives them.
        tokens: unique tokens that the run encodes.
        memory_bytes: of a worker.
        epochs: times that every user of the cell's subset is seen.
        learning_rate_factor: times the ladder's learning rates.
    """

    cell: Cell
    factor: Factor
    flops: float
    model_flops: float
    padded_flops: float
    parameters: dict[str, int]
    tokens: float
    memory_bytes: float
    epochs: float
    learning_rate_factor: float


@dataclass(frozen=True)
class _Place:
    """A point of a design; None: the ladder's value, or what the budget pays for."""

    parameters: float
    max_events: int
    samples: int | None = None
    batch_size: int | None = None
    budget: float | None = None
    rate_factor: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name}={value:g}" for name, value in vars(self).items() if value is not None)


def plan_cells(grid: GridConfig, ladder: LadderConfig, base: SweepBase) -> list[PlannedCell]:
    """All cells of a design, each once, in the order of the design.

    Raises:
        ValueError: the design lacks levels, two of its points are the same run, a size is not on the ladder, a batch
            is larger than the data, or a budget is too small for a whole number of steps.
    """
    factors = dict[_Place, Factor]()
    for factor, place in _places(grid):
        factors.setdefault(place, factor)
    planned: dict[str, PlannedCell] = {}
    origin: dict[str, _Place] = {}
    for place, factor in factors.items():
        found = _plan_cell(place, factor, grid, ladder, base)
        other = origin.setdefault(found.cell.cell_id, place)
        if other != place:
            raise ValueError(f"these points are the same run: ({other}) and ({place}); choose levels further apart")
        planned[found.cell.cell_id] = found
    return list(planned.values())


def _places(grid: GridConfig) -> Iterator[tuple[Factor, _Place]]:
    crossed = ("parameters", "max_events")
    needed = {"full": crossed, "star": ("center",), "isoflop": (*crossed, "budgets")}
    useless = {"full": ("budgets", "center"), "star": ("budgets",), "isoflop": ("samples", "center")}
    if missing := [name for name in needed[grid.design] if not getattr(grid, name)]:
        raise ValueError(f"design {grid.design} needs {' and '.join(missing)}: give at least one level")
    if extra := [name for name in useless[grid.design] if getattr(grid, name)]:
        raise ValueError(f"design {grid.design} has no use for {' and '.join(extra)}: leave it out")
    points = _star_points(grid) if grid.center else _crossed_points(grid)
    for (factor, place), rate_factor, seed in itertools.product(points, grid.learning_rate_factors, grid.seeds):
        yield factor, _Place(*place, rate_factor=rate_factor, seed=seed)


def _crossed_points(grid: GridConfig) -> list[tuple[Factor, tuple]]:
    factor: Factor = "budget" if grid.budgets else "grid"
    lists = (grid.samples or (None,), grid.batch_sizes or (None,), grid.budgets or (None,))
    return [(factor, point) for point in itertools.product(grid.parameters, grid.max_events, *lists)]


def _star_points(grid: GridConfig) -> list[tuple[Factor, tuple]]:
    center = grid.center
    assert center is not None
    middle = (center.parameters, center.max_events, center.samples, center.batch_size)
    arms: list[tuple[Factor, tuple]] = [
        ("model", grid.parameters),
        ("history", grid.max_events),
        ("samples", grid.samples),
        ("batch", grid.batch_sizes),
    ]
    points: list[tuple[Factor, tuple]] = [("center", middle)]
    for place, (factor, levels) in enumerate(arms):
        for level in levels:
            points.append((factor, (*middle[:place], level, *middle[place + 1 :])))
    return points


def _plan_cell(place: _Place, factor: Factor, grid: GridConfig, ladder: LadderConfig, base: SweepBase) -> PlannedCell:
    rung = make_rung(place.parameters, ladder, base.model)
    batch_size = place.batch_size or rung.global_batch_size
    workload = base.workload_of(rung.model, batch_size, place.max_events)
    num_steps = _num_steps(place, rung.num_samples, batch_size, step_cost(rung.model, workload.shape).total_flops)
    share = _user_share(grid, base, num_steps * batch_size)
    if batch_size > share * base.num_samples:
        raise ValueError(
            f"({place}): a batch of {batch_size} users is more than the {share * base.num_samples:,.0f} samples that "
            "the cell may see: choose smaller batches, more samples, fewer epochs, or users='all'"
        )
    rates = derive_learning_rates(rung.model.dim, batch_size, ladder.rate)
    cell = Cell(
        base=base.config_hash,
        model=rung.model,
        global_batch_size=batch_size,
        num_steps=num_steps,
        max_events=place.max_events,
        user_share=share,
        learning_rate=_rounded(place.rate_factor * rates[0].value),
        embedding_learning_rate=_rounded(place.rate_factor * rates[1].value),
        seed=place.seed,
    )
    return _price(cell, factor, place.rate_factor, workload, base)


def _price(cell: Cell, factor: Factor, rate_factor: float, workload: Workload, base: SweepBase) -> PlannedCell:
    cost = step_cost(cell.model, workload.shape)
    return PlannedCell(
        cell=cell,
        factor=factor,
        flops=cell.num_steps * cost.total_flops,
        model_flops=cell.num_steps * cost.model_flops,
        padded_flops=cell.num_steps * cost.padded_flops,
        parameters=parameter_counts(cell.model, base.vocab_size),
        tokens=cell.num_steps * workload.shape.items.positions,
        memory_bytes=workload.memory_bytes,
        epochs=cell.num_samples / (cell.user_share * base.num_samples),
        learning_rate_factor=rate_factor,
    )


def _num_steps(place: _Place, ladder_samples: int, batch_size: int, step_flops: float) -> int:
    if place.budget is None:
        samples = place.samples or max(ladder_samples, batch_size)
        if samples < batch_size:
            raise ValueError(f"({place}): {samples} samples are less than a batch of {batch_size} users: choose more")
        return round(samples / batch_size)
    num_steps = round(place.budget / step_flops)
    if abs(num_steps * step_flops / place.budget - 1) > ISOFLOP_TOLERANCE:
        raise ValueError(
            f"({place}): steps of {step_flops:.3g} operations do not come within {ISOFLOP_TOLERANCE:.0%} of the budget "
            f"of {place.budget:.3g}, which pays for {place.budget / step_flops:.2f} of them: raise the budget, or "
            "choose smaller models, shorter histories or smaller batches for it"
        )
    return num_steps


def _user_share(grid: GridConfig, base: SweepBase, num_samples: int) -> float:
    share = 1.0 if grid.users == "all" else num_samples / (grid.epochs * base.num_samples)
    return min(1.0, _rounded(share))


def _rounded(value: float) -> float:
    """Four digits: an id must not depend on the last bit of a machine's arithmetic."""
    return float(f"{value:.4g}")
