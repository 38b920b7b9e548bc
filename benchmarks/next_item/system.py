"""What the comparison needs to know of a system: its settings, and how it is trained and ranked with one of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from benchmarks.next_item.data_set import DataSet
from userrep.data.leave_one_out import Held, Sequences
from userrep.evaluation.next_item_ranking import NextItemRanks, rank_next_items

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """A trained system, ranked.

    Attributes:
        validation: ranks of the items that validate, by which settings and epochs are chosen.
        test: ranks of the items that test.
        facts: what else is worth a record, e.g. the epochs trained.
    """

    validation: NextItemRanks
    test: NextItemRanks
    facts: dict[str, float]

    @property
    def validation_ndcg(self) -> float:
        """Mean NDCG at 10 over the users, by which everything is chosen."""
        return float(self.validation.values()["ndcg_at_10"].mean())


class System(NamedTuple):
    """A rival: its grid, and a function of data, one of the grid's settings and a seed."""

    grid: tuple[Settings, ...]
    run: Callable[[DataSet, Settings, int], Outcome]
    is_seeded: bool = True


def rank_both(
    data: DataSet, scores: Callable[[Sequences], np.ndarray], facts: dict[str, float] | None = None
) -> Outcome:
    """Ranks of a system that scores all items, a row each, for any number of histories."""
    ranks = {held: rank_held(data, scores, held) for held in ("validation", "test")}
    return Outcome(ranks["validation"], ranks["test"], facts or {})


def rank_held(data: DataSet, scores: Callable[[Sequences], np.ndarray], held: Held) -> NextItemRanks:
    """Ranks of one kind of held-out items."""
    histories = data.split.histories(held)
    return rank_next_items(lambda start, stop: scores(histories.take(np.arange(start, stop))), data.split.targets(held))
