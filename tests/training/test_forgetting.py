"""What the methods are for: where all weights are trained on the next task the first one is forgotten, and with
TERACON it is not. NextItNet on tiny tasks that can be learned without a mistake; means over seeds."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny_cell import run_tiny, tiny_cell
from userrep.evaluation.transfer import backward_transfer

ORDER, SEEDS = ("T1", "T3"), (0, 1, 2)  # the next item, and a label that is but a matter of the last one


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """R of each method, (seeds, tasks, tasks)."""

    def run(name: str, seed: int) -> np.ndarray:
        directory: Path = tmp_path_factory.mktemp(name)
        return run_tiny(tiny_cell(name, ORDER, seed, max_epochs=10), directory)[0].scores_MM

    return {name: np.stack([run(name, seed) for seed in SEEDS]) for name in ("fineall", "teracon")}


def test_both_methods_learn_both_tasks(scores: dict[str, np.ndarray]) -> None:
    for scores_SMM in scores.values():
        first, second = np.diagonal(scores_SMM.mean(axis=0))
        assert first > 0.9  # of 12 items; a guess has less than .2
        assert second > 0.8  # of two classes


def test_fineall_forgets_and_teracon_forgets_less(scores: dict[str, np.ndarray]) -> None:
    change = {name: backward_transfer(scores_SMM)[:, 0].mean() for name, scores_SMM in scores.items()}
    assert change["fineall"] < -25  # percent of what was learned
    assert change["teracon"] > change["fineall"] / 2
