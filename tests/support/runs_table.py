"""Tables of runs whose law is known: star, ladder, IsoFLOP and learning-rate designs with noise of one's choice."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from userrep.scaling.laws import fit_laws
from userrep.scaling.records import Laws
from userrep.schema import RUNS

CENTER = {"N": 1e6, "D": 2e5, "S": 32, "B": 512}
LEVELS = {
    "N": ("model", (1e5, 2.2e5, 4.6e5, 2.2e6, 4.6e6, 1e7)),
    "D": ("samples", (2e4, 4.4e4, 9.2e4, 4.4e5, 9.2e5, 2e6)),
    "S": ("history", (4, 8, 16, 64, 128)),
    "B": ("batch", (32, 64, 128, 256, 1024, 2048)),
}
LARGER = ((1e7, 2e6), (2e7, 2e6), (2e7, 4e6))  # N and D of cells beyond both arms
FLOPS_PER_S = 2e12
TOKENS_PER_EVENT = 8
NUM_RESAMPLES = 100  # enough for tests of what an interval is used for


@dataclass(frozen=True)
class Planted:
    """L = floor + sum over factors of (term at the center) * (x / center) ** -exponent."""

    floor: float = 1.2
    terms: dict[str, float] = field(default_factory=lambda: {"N": 0.9, "D": 0.9, "S": 0.45, "B": 0.5})
    exponents: dict[str, float] = field(default_factory=lambda: {"N": 0.4, "D": 0.35, "S": 0.6, "B": 0.5})
    noise: float = 0.01
    seed: int = 0

    def loss(self, place: dict[str, float]) -> float:
        """Without noise."""
        return self.floor + sum(
            self.terms[name] * (place[name] / CENTER[name]) ** -self.exponents[name] for name in self.terms
        )


def star_runs(planted: Planted | None = None, num_larger: int = len(LARGER)) -> pa.Table:
    """Center, four arms, and larger cells; a failed and a planned one."""
    cells: list[tuple[str, dict[str, float]]] = [("center", dict(CENTER))]
    for name, (factor, levels) in LEVELS.items():
        cells += [(factor, CENTER | {name: level}) for level in levels]
    cells += [("grid", CENTER | {"N": n, "D": d}) for n, d in LARGER[:num_larger]]
    return _table(planted or Planted(), cells)


def ladder_runs(exponent: float = 0.25, floor: float = 1.5, num_cells: int = 10, noise: float = 0.01) -> pa.Table:
    """Cells that grow in model and samples alike: all are on the frontier, which is a power law in compute."""
    cells = [("grid", CENTER | {"N": 1e6 * x, "D": 2e5 * x}) for x in np.logspace(-1, 1, num_cells)]
    # With compute in proportion to N * D, both terms fall as compute ** -exponent.
    planted = Planted(
        floor - 0.95, exponents={"N": 2 * exponent, "D": 2 * exponent, "S": 0.6, "B": 0.5}, noise=noise, seed=1
    )
    return _table(planted, cells)


def isoflop_runs(planted: Planted | None = None) -> pa.Table:
    """Four budgets over two decades, seven sizes each; the budget pays for the samples."""
    cells = []
    for budget, ratio in itertools.product(np.geomspace(0.05, 10, 4), np.geomspace(0.15, 6, 7)):
        n = CENTER["N"] * math.sqrt(budget) * ratio
        cells.append(("budget", CENTER | {"N": n, "D": CENTER["D"] * budget * CENTER["N"] / n}))
    return _table(planted or Planted(), cells)


def rate_runs(planted: Planted | None = None) -> pa.Table:
    """Two models, four batches, five learning rates: the best factor rises with the batch by its square root."""
    cells = []
    for n, b, rate in itertools.product((3e5, 3e6), (64, 128, 256, 512), (0.25, 0.5, 1, 2, 4)):
        cells.append(("grid", CENTER | {"N": n, "B": b, "rate": rate}))
    return _table(planted or Planted(), cells)


@cache
def star_laws(seed: int = 0) -> Laws:
    """Laws of `star_runs`; fitted once in a session."""
    return fit_laws(star_runs(Planted(seed=seed)), num_resamples=NUM_RESAMPLES)


def change(table: pa.Table, cells: Iterable[str], **values: Any) -> pa.Table:
    """The table with other values in some of its rows."""
    chosen = set(cells)
    return pa.Table.from_pylist([row | values if row["cell_id"] in chosen else row for row in table.to_pylist()], RUNS)


def take(table: pa.Table, num_finished: int) -> pa.Table:
    """The first finished cells; the others are planned."""
    rows = table.to_pylist()
    finished = [row["cell_id"] for row in rows if row["status"] == "finished"]
    return pa.Table.from_pylist(
        [row if row["cell_id"] in finished[:num_finished] else _unfinished(row, "planned", "") for row in rows], RUNS
    )


def _table(planted: Planted, cells: Iterable[tuple[str, dict[str, float]]]) -> pa.Table:
    rng = np.random.default_rng(planted.seed)
    rows = [_row(planted, factor, place, number, rng) for number, (factor, place) in enumerate(cells)]
    failed = _unfinished(rows[-1], "failed", "out of memory at step 12") | {"cell_id": "f" * 12, "trunk_id": "f" * 12}
    planned = _unfinished(rows[-1], "planned", "") | {"cell_id": "e" * 12, "trunk_id": "e" * 12}
    return pa.Table.from_pylist([*rows, failed, planned], RUNS)


def _row(
    planted: Planted, factor: str, place: dict[str, float], number: int, rng: np.random.Generator
) -> dict[str, Any]:
    n, d, s, b = (place[name] for name in "NDSB")
    rate = place.get("rate", 1.0)
    tokens = d * s * TOKENS_PER_EVENT
    flops, steps, dim = 6 * n * tokens, max(1, round(d / b)), 16 * max(1, round((n / 12) ** (1 / 3) / 16))
    away = math.log2(rate / math.sqrt(b / 512)) if "rate" in place else 0.0
    loss = planted.loss(place) * math.exp(planted.noise * rng.standard_normal()) * (1 + 0.02 * away**2)
    probe = planted.noise * rng.standard_normal(2)
    points = [share * steps for share in (0.1, 0.2, 0.4, 0.7)] if steps >= 10 else []
    return {
        "cell_id": f"{number:012x}",
        "trunk_id": f"{number:012x}",
        "sweep": "planted",
        "factor": factor,
        "status": "finished",
        "message": "",
        "parameters": round(n),
        "embedding_parameters": 8000 * dim,
        "dim": dim,
        "item_layers": 2,
        "service_layers": 1,
        "samples": round(d),
        "user_share": 1.0,
        "epochs": d / 5e5,
        "max_events": round(s),
        "batch_size": round(b),
        "num_steps": steps,
        "learning_rate": 1e-3 * rate,
        "embedding_learning_rate": 2e-3 * rate,
        "learning_rate_factor": rate,
        "seed": 0,
        "flops": flops,
        "padded_flops": 2.5 * flops,
        "tokens": tokens,
        "loss": loss,
        "loss_as_trained": 1.01 * loss,
        "best_scale": 12.0,
        "pool_size": 4096,
        "recall_at_1": math.exp(-0.8 * loss),
        "recall_at_10": math.exp(-0.4 * loss),
        "downstream_losses": [("gender", 0.5 + 0.04 * loss + probe[0]), ("next_item", 1.2 * loss + probe[1])],
        "downstream_scores": [("gender", 0.8 - 0.04 * loss), ("next_item", 0.6 - 0.09 * loss)],
        "curve": [
            {
                "step": round(step),
                "flops": flops * step / steps,
                "loss": 1.04 * planted.loss(place | {"D": d * step / steps}),
            }
            for step in points
        ],
        "train_loss": 0.8 * loss,
        "train_s": flops / FLOPS_PER_S,
        "evaluate_s": 2.0,
        "flops_per_s": FLOPS_PER_S,
        "mfu": 0.3,
        "num_workers": 1,
        "device": "cpu",
        "finished_at": 1_700_000_000,
        "code_version": "0.1.0",
    }


def _unfinished(row: dict[str, Any], status: str, message: str) -> dict[str, Any]:
    nulls = {field.name: None for field in RUNS if field.nullable}
    return row | nulls | {"status": status, "message": message}
