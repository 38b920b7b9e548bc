"""Designs: which cells there are, what each is held to, and that no two are the same run."""

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from userrep.config import ConfigError
from userrep.models.clue import ClueConfig
from userrep.models.cost import StepShape, step_cost
from userrep.scaling.grid import Cell, Center, GridConfig, PlannedCell, SweepBase, plan_cells
from userrep.scaling.ladder import make_rung
from userrep.scaling.rules import LadderConfig
from userrep.scaling.workload import Workload
from userrep.training.settings import CluePretraining

LADDER = LadderConfig()
AVAILABLE = 10**6
CENTER = Center(parameters=1e6, samples=200_000, max_events=16, batch_size=512)


def workload_of(model: ClueConfig, batch_size: int, max_events: int) -> Workload:
    """Histories of all lengths up to the longest; items repeat the more, the more events there are."""
    histories = 1 + np.arange(2 * batch_size) % max_events
    items = 3 + np.arange(math.ceil(histories.sum() ** 0.8)) % 17
    return Workload(StepShape.of(items, histories, batch_size**2, batch_size**2), 16.0 * model.dim * batch_size)


BASE = SweepBase("base", ClueConfig(max_tokens=48), vocab_size=8000, num_samples=AVAILABLE, workload_of=workload_of)
STAR = GridConfig(
    design="star",
    center=CENTER,
    parameters=(1e4, 1e5, 1e6, 1e7),
    samples=(20_000, 60_000, 200_000, 600_000),
    max_events=(2, 4, 8, 16, 32),
    batch_sizes=(64, 128, 256, 512, 1024, 2048),
)


def plan(grid: GridConfig, base: SweepBase = BASE) -> list[PlannedCell]:
    return plan_cells(grid, LADDER, base)


def ids(cells: list[PlannedCell]) -> list[str]:
    return [planned.cell.cell_id for planned in cells]


def factors_of(cell: Cell) -> dict[str, Any]:
    """The four factors of a cell; samples to half a batch of the largest."""
    return {
        "model": cell.model,
        "history": cell.max_events,
        "batch": cell.global_batch_size,
        "samples": round(cell.num_samples / 4096),
    }


def test_a_full_design_has_every_combination_once() -> None:
    sizes, samples, events, batches = (1e4, 1e6), (20_000, 80_000), (4, 16, 64), (128, 512)
    cells = plan(GridConfig(design="full", parameters=sizes, samples=samples, max_events=events, batch_sizes=batches))
    assert len(set(ids(cells))) == len(cells) == 2 * 2 * 3 * 2
    expected = [
        (make_rung(size, LADDER, BASE.model).model, event, round(sample / batch), batch)
        for size, event, sample, batch in itertools.product(sizes, events, samples, batches)
    ]
    found = [(c.cell.model, c.cell.max_events, c.cell.num_steps, c.cell.global_batch_size) for c in cells]
    assert found == expected
    assert {planned.factor for planned in cells} == {"grid"}


def test_levels_that_are_not_given_are_the_ladders() -> None:
    sizes = (1e4, 1e5, 1e6)
    cells = plan(GridConfig(design="full", parameters=sizes, max_events=(8,)))
    for size, planned in zip(sizes, cells, strict=True):
        rung = make_rung(size, LADDER, BASE.model)
        assert planned.cell.model == rung.model
        assert planned.cell.global_batch_size == rung.global_batch_size
        assert planned.cell.learning_rate == rung.learning_rate
        assert planned.cell.embedding_learning_rate == rung.embedding_learning_rate
        assert planned.cell.num_steps == rung.num_steps


def test_an_arm_of_a_star_changes_its_factor_alone() -> None:
    cells = plan(STAR)
    assert len(set(ids(cells))) == len(cells) == 1 + 3 + 3 + 4 + 5  # the center is on every arm, and there once
    center = cells[0]
    assert center.factor == "center"
    assert center.cell.num_samples == pytest.approx(CENTER.samples, abs=CENTER.batch_size / 2)
    for planned in cells[1:]:
        mine, middle = factors_of(planned.cell), factors_of(center.cell)
        assert [name for name in mine if mine[name] != middle[name]] == [planned.factor]
        assert (planned.cell.learning_rate == center.cell.learning_rate) == (planned.factor in ("history", "samples"))
    assert math.log10(max(c.flops for c in cells) / min(c.flops for c in cells)) > 2


def test_the_order_of_levels_and_arms_makes_no_other_cells() -> None:
    other = GridConfig(
        design="star",
        center=CENTER,
        batch_sizes=STAR.batch_sizes[::-1],
        max_events=STAR.max_events[::-1],
        samples=(*STAR.samples, STAR.samples[0]),
        parameters=STAR.parameters[::-1],
    )
    assert sorted(ids(plan(other))) == sorted(ids(plan(STAR)))


def test_a_run_keeps_its_id_in_every_design() -> None:
    middle = plan(STAR)[0].cell
    crossed = GridConfig(design="full", parameters=(1e6,), samples=(200_000,), max_events=(16,), batch_sizes=(512,))
    assert ids(plan(crossed)) == [middle.cell_id]
    again = Cell.parse(json.loads(json.dumps(dict(reversed(middle.model_dump(mode="json").items())))))
    assert again.cell_id == middle.cell_id


@pytest.mark.parametrize("name", [name for name in Cell.model_fields if name != "model"])
def test_every_value_is_part_of_the_id(name: str) -> None:
    cell = plan(STAR)[0].cell
    value = getattr(cell, name)
    other = cell.model_copy(
        update={name: "other" if name == "base" else value / 2 if name == "user_share" else value + 1}
    )
    assert other.cell_id != cell.cell_id
    assert (other.trunk_id == cell.trunk_id) == (name == "num_steps")


def test_durations_of_one_trunk_are_found_where_all_users_are_seen() -> None:
    grid = GridConfig(
        design="full",
        parameters=(1e5, 1e6),
        samples=(20_000, 40_000, 80_000),
        max_events=(8,),
        batch_sizes=(256,),
        users="all",
    )
    trunks = {planned.cell.trunk_id for planned in plan(grid)}
    assert len(trunks) == 2
    nested = plan(grid.model_copy(update={"users": "nested"}))
    assert len({planned.cell.trunk_id for planned in nested}) == 6


@settings(deadline=None, max_examples=20)
@given(st.floats(0, 3), st.lists(st.sampled_from([1e4, 3e4, 1e5, 1e6, 1e7]), min_size=1, max_size=4, unique=True))
def test_isoflop_cells_meet_their_budget(exponent: float, sizes: list[float]) -> None:
    # The dearest step: 1e7 parameters. A budget of 30 of its steps can be met by every size.
    largest = make_rung(max(sizes), LADDER).model
    step = step_cost(largest, workload_of(largest, 256, 12).shape).total_flops
    budgets = (30 * step * 10**exponent, 70 * step * 10**exponent)
    grid = GridConfig(
        design="isoflop", parameters=tuple(sizes), max_events=(12,), batch_sizes=(256,), budgets=budgets, users="all"
    )
    cells = plan(grid)
    assert len(set(ids(cells))) == len(cells) == 2 * len(sizes)
    for planned, (_, budget) in zip(cells, itertools.product(sizes, budgets), strict=True):
        assert planned.flops == pytest.approx(budget, rel=0.02)
        cost = step_cost(planned.cell.model, workload_of(planned.cell.model, 256, 12).shape)
        assert planned.flops == planned.cell.num_steps * cost.total_flops
        assert planned.padded_flops == planned.cell.num_steps * cost.padded_flops
        assert planned.factor == "budget"


def test_a_budget_that_no_number_of_steps_meets_is_refused() -> None:
    model = make_rung(1e6, LADDER).model
    step = step_cost(model, workload_of(model, 256, 12).shape).total_flops
    for steps in (0.4, 10.4):
        grid = GridConfig(
            design="isoflop", parameters=(1e6,), max_events=(12,), batch_sizes=(256,), budgets=(steps * step,)
        )
        with pytest.raises(ValueError, match=rf"do not come within 2% of the budget .* pays for {steps:.2f} of them"):
            plan(grid)


def test_fewer_samples_are_fewer_users_of_the_same_ones() -> None:
    samples = (50_000, 100_000, 500_000, 1_000_000, 4_000_000)
    for epochs in (0.5, 1.0, 4.0):
        grid = GridConfig(
            design="full", parameters=(1e5,), samples=samples, max_events=(8,), batch_sizes=(500,), epochs=epochs
        )
        for planned in plan(grid):
            whole = planned.cell.num_samples / AVAILABLE
            assert planned.cell.user_share == pytest.approx(min(1, whole / epochs), rel=1e-3)
            assert planned.epochs == pytest.approx(max(epochs, whole), rel=1e-3)
    everybody = plan(grid.model_copy(update={"users": "all"}))
    assert {planned.cell.user_share for planned in everybody} == {1.0}


def test_rates_and_seeds_multiply_the_cells() -> None:
    grid = GridConfig(
        design="full",
        parameters=(1e4, 1e5),
        samples=(20_000,),
        max_events=(8,),
        batch_sizes=(64, 256),
        learning_rate_factors=(0.5, 1, 2),
        seeds=(0, 1),
    )
    cells = plan(grid)
    assert len(set(ids(cells))) == len(cells) == 2 * 2 * 3 * 2
    for low, middle, high in zip(cells[0::6], cells[2::6], cells[4::6], strict=True):
        assert low.cell.learning_rate == pytest.approx(middle.cell.learning_rate / 2, rel=1e-3)
        assert high.cell.embedding_learning_rate == pytest.approx(2 * middle.cell.embedding_learning_rate, rel=1e-3)
        assert (
            low.cell.model_copy(
                update={name: getattr(high.cell, name) for name in ("learning_rate", "embedding_learning_rate")}
            )
            == high.cell
        )
    assert [planned.cell.seed for planned in cells[:2]] == [0, 1]


def test_a_cell_is_a_pretraining_config() -> None:
    for planned in plan(STAR):
        cell = planned.cell
        config = CluePretraining().with_overrides(cell.overrides())
        assert config.model == cell.model
        assert config.views.max_events == config.augment.max_events == cell.max_events
        assert (config.global_batch_size, config.num_steps) == (cell.global_batch_size, cell.num_steps)
        assert config.optim.learning_rate == cell.learning_rate
        assert config.optim.embedding_learning_rate == cell.embedding_learning_rate
        assert (config.optim.bag_steps, config.seed) == (0, cell.seed)
        assert config.model.max_tokens == 48
        assert planned.memory_bytes == 16.0 * cell.model.dim * cell.global_batch_size
        assert (
            planned.tokens
            == cell.num_steps * workload_of(cell.model, cell.global_batch_size, cell.max_events).shape.items.positions
        )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"design": "full", "parameters": (1e5,)}, "design full needs max_events: give at least one level"),
        ({"design": "isoflop", "max_events": (4,)}, "design isoflop needs parameters and budgets"),
        ({"design": "star", "parameters": (1e5,)}, "design star needs center"),
        ({"design": "full", "parameters": (1e5,), "max_events": (4,), "budgets": (1e12,)}, "no use for budgets: leave"),
        ({"design": "full", "parameters": (1e5,), "max_events": (4,), "center": CENTER}, "no use for center"),
        (
            {"design": "isoflop", "parameters": (1e5,), "max_events": (4,), "budgets": (1e12,), "samples": (9,)},
            "no use for samples",
        ),
        ({"design": "full", "parameters": (1e5, 1.001e5), "max_events": (4,)}, "are the same run: .*parameters=100000"),
        (
            {"design": "full", "parameters": (1e5,), "max_events": (4,), "samples": (20,)},
            "20 samples are less than a batch",
        ),
        (
            {"design": "full", "parameters": (1e5,), "max_events": (4,), "samples": (600,), "epochs": 5},
            "more than the .* samples that the cell may see: choose smaller batches, more samples, fewer epochs",
        ),
        ({"design": "full", "parameters": (1e3,), "max_events": (4,)}, "not on the ladder"),
    ],
)
def test_designs_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(GridConfig.parse(values))


@pytest.mark.parametrize("values", [{"parameters": [0.0]}, {"max_events": [0]}, {"epochs": 0}, {"design": "other"}])
def test_levels_that_are_none_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        GridConfig.parse({"design": "full", **values})
