"""What the cells of an experiment with continual tasks say together: every score, a page of numbers, and figures."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.continual_figures import draw_figures
from pipelines.continual_groups import METRIC_NAMES, Group, arrows, by_order, group_cells
from pipelines.report import FIGURE_STYLE
from userrep.evaluation.transfer import Interval
from userrep.schema import TASKS_MATRIX
from userrep.training.cells import CellResult

MATRIX_NAME, TABLE_NAME, FIGURES = "tasks_matrix.parquet", "tasks.md", "figures"


def write_continual_report(results: Sequence[CellResult], directory: Path) -> None:
    """Writes `tasks_matrix.parquet`, `tasks.md` and `figures/*.svg`; files of those names are replaced.

    Args:
        results: of finished cells of one data set.
        directory: is made.

    Raises:
        ValueError: see `group_cells`.
    """
    groups = group_cells(results)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{MATRIX_NAME}.{os.getpid()}.tmp"
    pq.write_table(tasks_matrix(results), temporary)
    os.replace(temporary, directory / MATRIX_NAME)
    (directory / TABLE_NAME).write_text(format_groups(groups), encoding="ascii")
    with matplotlib.rc_context(FIGURE_STYLE):
        for name, figure in draw_figures(groups):
            figure.savefig(directory / FIGURES / f"{name}.svg", metadata={"Date": None})


def tasks_matrix(results: Sequence[CellResult]) -> pa.Table:
    """All scores of R, one a row, of the schema TASKS_MATRIX; a joint method has but the last row of R."""
    rows = []
    for result in results:
        cell, scores_MM = result.cell, result.scores_MM
        metrics = {name: metric for lesson in result.lessons for name, metric in lesson.metrics.items()}
        for j, i in np.argwhere(np.isfinite(scores_MM)).tolist():
            task = cell.order[i]
            places = {"j": j, "i": i, "trained": cell.order[j], "task": task, "metric": metrics[task]}
            keys = {"method": cell.label, "order": list(cell.order), "seed": cell.seed}
            rows.append(keys | places | {"score": scores_MM[j, i]})
    return pa.Table.from_pylist(rows, TASKS_MATRIX)


def format_groups(groups: Sequence[Group]) -> str:
    """Markdown: for every order the final scores, method by task, and the transfer between tasks."""
    parts = ["# Continual tasks", "Means over seeds; +- is half of the 95% interval (Student's t)."]
    for order, members in by_order(groups):
        heads = [f"{name} {METRIC_NAMES[members[0].metrics[name]]}" for name in order]
        rows = [
            [group.label, str(group.final.num_seeds), *(_value(group.final, i, "{:.4f}") for i in range(len(order)))]
            for group in members
        ]
        parts += [f"## Order {arrows(order)}", "Scores on test users after the last task.", _table(heads, rows)]
        rows = [
            [
                f"{group.label} {name}",
                str(interval.num_seeds),
                *(_value(interval, i, "{:+.2f}") for i in range(len(order))),
            ]
            for group in members
            for name, interval in (("FWT", group.forward), ("BWT", group.backward))
            if np.isfinite(interval.mean).any()
        ]
        if rows:
            parts += ["Forward and backward transfer, percent.", _table(list(order), rows)]
    return "\n\n".join(parts) + "\n"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [["method", "seeds", *heads], ["---", *["---:"] * (len(heads) + 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(interval: Interval, i: int, form: str) -> str:
    mean, reach = interval.mean[i], interval.high[i] - interval.mean[i]
    if not np.isfinite(mean):
        return "-"
    return form.format(mean) + (f" +- {form.replace('+', '').format(reach)}" if np.isfinite(reach) else "")
