"""Finished cells with scores of one's choice."""

import numpy as np

from userrep.training.cells import Cell, CellResult, EpochScore, Lesson

ORDER = ("T1", "T2", "T3")
METRICS = {"T1": "mrr_at_5", "T2": "mrr_at_5", "T3": "accuracy", "noise": "accuracy", "universal": "recall_at_10"}


def result_of(
    method: str, scores: list[list[float]], seed: int = 0, order: tuple[str, ...] = ORDER, **options: object
) -> CellResult:
    """A cell with rows of R; one row is a joint method's."""
    lessons = []
    for place, row in enumerate(scores):
        taught = order if len(scores) == 1 else order[place : place + 1]
        curve = [
            EpochScore(
                phase="train",
                epoch=e,
                scores=dict.fromkeys(taught, 0.1 * e),
                losses=dict.fromkeys(taught, 2.0),
                seconds=1,
            )
            for e in range(3)
            if "universal" not in taught  # of a pretrained encoder, it is measured and not taught
        ]
        lessons.append(
            Lesson.parse(
                {
                    "tasks": taught,
                    "scores": dict(zip(order, row, strict=False)),
                    "metrics": {name: METRICS[name] for name in order[: len(row)]},
                    "curve": curve,
                    "similarity": np.eye(len(row)).tolist() if method == "teracon" else None,
                    "num_steps": 5 * (place + 1),
                    "seconds": 2.0,
                }
            )
        )
    return CellResult(Cell(method=method, order=order, seed=seed, options=dict(options)), tuple(lessons))


def results() -> list[CellResult]:
    return [
        result_of("sinmo", [[0.10], [0.10, 0.20], [0.10, 0.20, 0.5]], seed=0),
        result_of("sinmo", [[0.12], [0.12, 0.24], [0.12, 0.24, 0.5]], seed=1),
        result_of("teracon", [[0.10], [0.09, 0.30], [0.08, 0.33, 0.6]], seed=1),
        result_of("teracon", [[0.10], [0.11, 0.30], [0.12, 0.27, 0.4]], seed=0),
        result_of("mtl", [[0.11, 0.22, 0.55]], seed=0),
    ]
