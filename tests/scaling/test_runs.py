import math

import numpy as np
import pyarrow as pa
import pytest

from tests.support.runs_table import change, star_runs, take
from userrep.scaling.runs import read_runs
from userrep.schema import RUNS


def variants(*values: dict) -> pa.Table:
    """The center cell again and again."""
    center = star_runs().to_pylist()[0]
    return pa.Table.from_pylist([center | {"cell_id": f"cell{i}"} | row for i, row in enumerate(values)], RUNS)


def test_a_place_has_the_mean_over_seeds_at_its_best_learning_rate() -> None:
    table = variants(
        {"learning_rate_factor": 1.0, "seed": 0, "loss": 3.0},
        {"learning_rate_factor": 1.0, "seed": 1, "loss": 5.0},
        {"learning_rate_factor": 2.0, "seed": 1, "loss": 3.5, "recall_at_1": 0.1},
        {"learning_rate_factor": 2.0, "seed": 0, "loss": 3.7, "recall_at_1": 0.3},
    )
    facts, [place] = read_runs(table)
    assert (place.loss, place.num_seeds, place.num_rates) == (pytest.approx(3.6), 2, 2)
    assert (place.learning_rate_factor, place.cell_id) == (2.0, "cell3")
    assert place.recalls["recall_at_1"] == pytest.approx(0.2)
    assert facts.seed_noise == pytest.approx(np.std(np.log([3.5, 3.7]), ddof=1))


def test_a_diverged_learning_rate_loses_its_place_to_another() -> None:
    table = variants({"learning_rate_factor": 4.0, "loss": math.nan}, {"learning_rate_factor": 1.0, "loss": 3.0})
    facts, [place] = read_runs(table)
    assert place.loss == 3.0
    assert facts.left_out == ("1 finished cells are left out: their loss is not a positive number",)


def test_losses_among_another_pool_are_left_out_and_said_to_be() -> None:
    table = change(star_runs(), ["000000000001", "000000000002"], pool_size=512)
    facts, places = read_runs(table)
    assert len(places) == 25
    assert facts.pool_size == 4096
    assert "2 finished cells" in facts.left_out[0]


def test_cells_are_counted_with_the_reasons_of_failures() -> None:
    facts, places = read_runs(star_runs())
    assert (facts.num_finished, facts.num_failed, facts.num_planned, len(places)) == (27, 1, 1, 27)
    assert facts.failures == (("out of memory at step 12", 1),)
    assert facts.decades == pytest.approx(math.log10(places[-1].compute / places[0].compute))
    assert facts.hours == pytest.approx((facts.flops / facts.flops_per_s + 2 * 27) / 3600)


def test_without_finished_cells_there_are_no_places() -> None:
    facts, places = read_runs(take(star_runs(), 0))
    assert (places, facts.pool_size, facts.flops_per_s, facts.num_planned) == ((), None, None, 29)


def test_a_table_of_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lacks the columns \['loss'\]"):
        read_runs(star_runs().drop_columns(["loss"]))
