"""What the cells of an experiment with continual tasks say together: every score, a page of numbers, and figures."""

import os
from collections.abc import Iterator, Mapping, Sequence
from math import nan
from pathlib import Path
from statistics import fmean

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.continual_figures import draw_figures
from pipelines.continual_groups import METRIC_NAMES, Group, arrows, by_order, group_cells
from pipelines.report import FIGURE_STYLE
from userrep.evaluation.transfer import Interval, mean_interval, paired_difference
from userrep.schema import TASKS_MATRIX
from userrep.training.cells import CellResult, Lesson

MATRIX_NAME, TABLE_NAME, FIGURES = "tasks_matrix.parquet", "tasks.md", "figures"
MAIN = "teracon"  # with its defaults: the method that the others are compared with

Popularity = Mapping[int, Mapping[str, float]]  # by seed, by name of the task
Rows = list[list[str]]  # of a table: a method, its seeds, and a value for each task


def write_continual_report(results: Sequence[CellResult], popularity: Popularity, directory: Path) -> None:
    """Writes `tasks_matrix.parquet`, `tasks.md` and `figures/*.svg`; files of those names are replaced.

    Args:
        results: of finished cells of one data set.
        popularity: what `popularity_score` gives for the tasks that cells of a seed were taught; may lack some.
        directory: is made.

    Raises:
        ValueError: see `group_cells`.
    """
    groups = group_cells(results)
    (directory / FIGURES).mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{MATRIX_NAME}.{os.getpid()}.tmp"
    pq.write_table(tasks_matrix(results), temporary)
    os.replace(temporary, directory / MATRIX_NAME)
    (directory / TABLE_NAME).write_text(format_groups(groups, popularity), encoding="utf-8")
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


def format_groups(groups: Sequence[Group], popularity: Popularity) -> str:
    """Markdown: for every order of tasks a table of scores, transfer, differences and times, method by task.

    Args:
        groups: as `group_cells` sorts them.
        popularity: see `write_continual_report`.
    """
    parts = ["# Continual tasks", "Means over seeds; +- is half of the 95% interval (Student's t)."]
    for order, members in by_order(groups):
        parts.append(f"## Order {arrows(order)}")
        for title, heads, rows in _tables(order, members, popularity):
            if rows:
                parts += [title, _table(heads, rows)]
    return "\n\n".join(parts) + "\n"


def outcome_metrics(results: Sequence[CellResult], order: tuple[str, ...]) -> dict[str, float]:
    """Means over seeds, for MLflow; what is not known is left out.

    Args:
        results: of finished cells of one data set.
        order: names of tasks; cells of another order tell but what a task scores alone.

    Returns:
        `final/<task>/<method>`, and in percent `forward_transfer/<task>/<method>` and `backward_transfer/...`.

    Raises:
        ValueError: see `group_cells`.
    """
    metrics = {}
    for group in (group for group in group_cells(results) if group.order == order):
        kinds = {"final": group.final, "forward_transfer": group.forward, "backward_transfer": group.backward}
        for kind, interval in kinds.items():
            for task, mean in zip(order, interval.mean.tolist(), strict=True):
                if np.isfinite(mean):
                    metrics[f"{kind}/{task}/{group.slug}"] = mean
    return metrics


def _tables(
    order: tuple[str, ...], members: Sequence[Group], popularity: Popularity
) -> Iterator[tuple[str, Sequence[str], Rows]]:
    """Title, heads of the tasks' columns, and rows of each table of an order."""
    measured = [f"{name} {METRIC_NAMES[members[0].metrics[name]]}" for name in order]
    title = (
        "Scores on test users after the last task. `popularity` ranks the classes by how often training has them, for "
        "every user alike."
    )
    scores = [_row(group.label, group.final, "{:.4f}") for group in members]
    yield title, measured, _popularity_rows(members, popularity) + scores
    yield "Forward and backward transfer, percent.", order, _transfer_rows(members)
    title = (
        f"Final scores of {MAIN} minus those of the others, seed by seed. `*`: the 95% interval excludes 0; nothing is "
        "corrected for the number of comparisons."
    )
    yield title, measured, _difference_rows(members)
    title = "Seconds of training per epoch; without methods that are taught all tasks at once."
    yield title, order, _time_rows(members)


def _popularity_rows(members: Sequence[Group], popularity: Popularity) -> Rows:
    seeds = sorted({seed for group in members for seed in group.seeds} & popularity.keys())
    if not seeds:
        return []
    scores_SM = np.array([[popularity[seed].get(name, np.nan) for name in members[0].order] for seed in seeds])
    return [_row("popularity", mean_interval(scores_SM), "{:.4f}")]


def _transfer_rows(members: Sequence[Group]) -> Rows:
    return [
        _row(f"{group.label} {name}", interval, "{:+.2f}")
        for group in members
        for name, interval in (("FWT", group.forward), ("BWT", group.backward))
        if np.isfinite(interval.mean).any()
    ]


def _difference_rows(members: Sequence[Group]) -> Rows:
    finals = {group.label: dict(zip(group.seeds, group.scores_SMM[:, -1], strict=True)) for group in members}
    own, rows = finals.pop(MAIN, {}), []
    for label, other in finals.items():
        seeds = sorted(own.keys() & other.keys())
        if len(seeds) > 1:
            pair = (np.array([final[seed] for seed in seeds]) for final in (own, other))
            rows.append(_row(label, paired_difference(*pair), "{:+.4f}", marks=True))
    return rows


def _time_rows(members: Sequence[Group]) -> Rows:
    rows = []
    for group in members:
        if not group.is_joint:
            seconds_SM = [[_epoch_seconds(lesson) for lesson in result.lessons] for result in group.results]
            rows.append(_row(group.label, mean_interval(np.array(seconds_SM)), "{:.2f}"))
    return rows


def _epoch_seconds(lesson: Lesson) -> float:
    """Mean over the epochs; NaN of a task that was not taught, as that of a pretrained encoder."""
    seconds = [point.seconds for point in lesson.curve if point.epoch]
    return fmean(seconds) if seconds else nan


def _row(name: str, interval: Interval, form: str, marks: bool = False) -> list[str]:
    """Name, seeds, and a value for each task: mean +- reach; with `marks`, a star where the interval excludes 0."""
    values = []
    for mean, low, high in zip(interval.mean, interval.low, interval.high, strict=True):
        value = form.format(mean) if np.isfinite(mean) else "-"
        if np.isfinite(high):
            value += f" +- {form.replace('+', '').format(high - mean)}"
        values.append(value + (" *" if marks and (low > 0 or high < 0) else ""))
    return [name, str(interval.num_seeds), *values]


def _table(heads: Sequence[str], rows: Rows) -> str:
    lines = [["method", "seeds", *heads], ["---", *["---:"] * (len(heads) + 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
