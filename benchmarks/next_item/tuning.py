"""From a grid to a tested system: the best settings on validation, then all seeds with these settings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.next_item.data_set import DataSet
from benchmarks.next_item.system import Outcome, Settings, System
from userrep.evaluation.next_item_ranking import METRICS, summarize
from userrep.evaluation.transfer import mean_interval

Say = Callable[[str], None]


@dataclass(frozen=True)
class Tuned:
    """A system with the settings that validated best.

    Attributes:
        settings: the chosen ones.
        grid: validation NDCG@10 of every setting with the first seed.
        outcomes: by seed; a system without seeds has one, under the first.
    """

    settings: Settings
    grid: list[tuple[Settings, float]]
    outcomes: dict[int, Outcome]


def tune(name: str, system: System, data: DataSet, seeds: Sequence[int], say: Say) -> Tuned:
    """Tries every setting with the first seed, and the best one (of equal ones the first) with the other seeds.

    The first seed's run with the best setting counts as one of the seeds.

    Args:
        name: of the system, for the lines of progress.
        system: what is tuned.
        data: the set.
        seeds: at least one.
        say: is told of every run.

    Raises:
        ValueError: no seed.
    """
    if not seeds:
        raise ValueError("no seed to train with: give at least one")
    grid = list[tuple[Settings, float]]()
    best: Outcome | None = None
    for number, settings in enumerate(system.grid, 1):
        outcome = system.run(data, settings, seeds[0])
        grid.append((settings, outcome.validation_ndcg))
        say(f"{data.name} {name} {number}/{len(system.grid)} {_line(settings, outcome)}")
        if best is None or outcome.validation_ndcg > best.validation_ndcg:
            best = outcome
    assert best is not None  # a system has at least one setting
    chosen = max(grid, key=lambda entry: entry[1])[0]
    outcomes = {seeds[0]: best}
    for seed in seeds[1:] if system.is_seeded else ():
        outcomes[seed] = system.run(data, chosen, seed)
        say(f"{data.name} {name} seed {seed} {_line(chosen, outcomes[seed])}")
    return Tuned(chosen, grid, outcomes)


def half_fraction(grid: tuple[Settings, ...]) -> tuple[Settings, ...]:
    """Half of a grid of two values per key: every pair of values of two keys is in it once.

    Source: the 2^(3-1) fractional factorial design (Box, Hunter and Hunter, Statistics for Experimenters).

    Raises:
        ValueError: the grid is not one of three keys with two values each.
    """
    values = {key: sorted({settings[key] for settings in grid}) for key in grid[0]}
    if [len(found) for found in values.values()] != [2, 2, 2] or len(grid) != 8:
        raise ValueError(f"a grid of {values} has no half: three keys with two values each have one")
    return tuple(
        settings for settings in grid if sum(values[key].index(value) for key, value in settings.items()) % 2 == 1
    )


def result(name: str, data: DataSet, tuned: Tuned) -> dict[str, Any]:
    """JSON-plain: settings, grid, every seed's metrics over all, cold and in-set users, and their means over seeds.

    A mean's interval is 95% over seeds, null with one seed; that of a seed is 95% over users (bootstrap).
    """
    is_cold = data.split.is_cold("test", data.train_users)
    slices = {"in_set": ~is_cold, "cold": is_cold}
    of_seed = {seed: summarize(outcome.test.values(), slices) for seed, outcome in tuned.outcomes.items()}
    return {
        "system": name,
        "settings": dict(tuned.settings),
        "grid": [{**settings, "validation_ndcg_at_10": ndcg} for settings, ndcg in tuned.grid],
        "test": {part: _over_seeds([found[part] for found in of_seed.values()]) for part in ("all", *slices)},
        "seeds": [
            {"seed": seed, "validation_ndcg_at_10": outcome.validation_ndcg, **outcome.facts, "test": of_seed[seed]}
            for seed, outcome in tuned.outcomes.items()
        ],
    }


def _over_seeds(parts: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_users": parts[0]["num_users"]}
    for metric in METRICS if found["num_users"] else ():
        interval = mean_interval(np.array([part[metric]["mean"] for part in parts]))
        low, high = (None if np.isnan(bound) else float(bound) for bound in (interval.low, interval.high))
        found[metric] = {"mean": float(interval.mean), "low": low, "high": high}
    return found


def _line(settings: Settings, outcome: Outcome) -> str:
    shown = [f"{key}={value}" for key, value in settings.items()]
    facts = [f"{key} {value:.0f}" for key, value in outcome.facts.items()]
    return ", ".join([*shown, f"validation NDCG@10 {outcome.validation_ndcg:.4f}", *facts])
