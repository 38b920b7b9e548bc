"""The card of an embedding table: one Markdown page that says what it is, from what, how good, and how to use it."""

import json
from collections.abc import Mapping
from typing import Any

from userrep.publishing.entity import USER, Entity
from userrep.schema import scale_column, task_column

CARD_NAME = "card.md"

RECIPE = """\
from pathlib import Path
from userrep.publishing.client import pull
from userrep.publishing.table import lookup
table = pull("{name}@{alias}", Path("{name}"), tracking_uri="{uri}")
print(lookup(table.dataset(), ["some-{entity}-id"]).to_pylist())"""
ONE_COLUMN = """
vectors = table.dataset().to_table(columns={columns})  # no other column is read"""

COLUMNS_MEANING = """\
Every user has one vector per column, all of them of the same width and type. `embedding` is the universal vector, for
whatever has no column of its own. `embedding_TASK` is the same user as that task sees it, from the
most recent events of all services as one history; its score is on histories without what the task asks for. Compare
vectors of one column only."""


def render_card(manifest_facts: Mapping[str, Any], entity: Entity = USER) -> str:
    """Renders the facts of a table's manifest as Markdown.

    Args:
        manifest_facts: `rows`, `dim`, `dtype`, `metric`, the digests, `code_version`, `config_hash`, `created_at` and
            `table_sha256`; optional `name`, `quality` ({measure: {system: value}}), `slices` ({slice: {measure:
            value}}), `drift` ({what: value}), `refresh` (`since`, a table, and numbers of users that are `new`,
            `changed`, `unchanged` and `removed`), `coverage` ({what: number of rows}), `limits` (lines of text),
            `tasks` (names of those with a column), `task_kinds` ({task: kind}), `task_scores` ({task: {metric:
            value}}), `quantisation`, `id_space` and `code_commit`. See `userrep.publishing.table.finish_table`.
        entity: what a row stands for.

    Raises:
        KeyError: a fact of the first group is missing.
    """
    facts = manifest_facts
    name, tasks = str(facts.get("name", "NAME")), tuple(facts.get("tasks", ()))
    sections = [
        f"# {entity.name.capitalize()} embeddings{': ' + _inline(name) if 'name' in facts else ''}",
        f"One vector per {entity.name}{' and column' if tasks else ''}, {entity.made_by}"
        f"{', which was then taught task after task' if tasks else ''}: "
        f"{facts['rows']:,} {entity.name}s, {facts['dim']} dimensions, {facts['dtype']}, L2 norm 1. "
        f"Compare vectors by {facts['metric']} similarity (for unit vectors: the dot product).",
        *([_columns(facts)] if tasks else []),
        _made_from(facts),
        _quality(facts.get("quality") or {}),
        *([_figures("Quality by slice", facts["slices"])] if facts.get("slices") else []),
        _drift(facts.get("drift") or {}, name),
        *([_quantisation(facts["quantisation"])] if facts.get("quantisation") else []),
        _coverage(facts, entity),
        "## Limits\n\n" + "\n".join(f"- {_inline(line)}" for line in (*entity.limits, *facts.get("limits", ()))),
        _how_to_pull(name, facts, entity),
    ]
    return "\n\n".join(sections) + "\n"


def _columns(facts: Mapping[str, Any]) -> str:
    """What the columns of vectors mean, and the tasks with their kind and scores where those are known."""
    kinds, scores = facts.get("task_kinds") or {}, facts.get("task_scores") or {}
    lines = []
    for task in facts["tasks"]:
        score = ", ".join(f"{_inline(metric)} {value:.4f}" for metric, value in scores.get(task, {}).items())
        lines.append(f"| `{task_column(task)}` | {_inline(kinds.get(task, '-'))} | {score or '-'} |")
    head = ["| column | kind of task | score |", "|---|---|---|"]
    return "\n".join(["## Columns", "", COLUMNS_MEANING, "", *head, *lines])


def _made_from(facts: Mapping[str, Any]) -> str:
    rows = [
        ("data manifest digest", facts["data_digest"]),
        ("encoder digest", facts["encoder_digest"]),
        ("tokenizer digest", facts["tokenizer_digest"]),
        ("config hash", facts["config_hash"]),
        ("code version", facts["code_version"]),
        *(
            (what, facts[key])
            for what, key in (("code commit", "code_commit"), ("ids of", "id_space"))
            if facts.get(key)
        ),
        ("created (UTC)", facts["created_at"]),
        ("table sha256", facts["table_sha256"]),
    ]
    lines = [f"| {what} | `{_inline(value)}` |" for what, value in rows]
    return "\n".join(["## Made from", "", "| what | value |", "|---|---|", *lines, "", "Full config: `manifest.json`."])


def _quality(quality: Mapping[str, Mapping[str, float]]) -> str:
    """Measures as rows, systems (this table, baselines) as columns."""
    if not quality:
        return "## Quality\n\nNot measured: no figures were given when this table was written."
    return _figures("Quality", quality)


def _figures(heading: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Rows and columns of figures, in the order in which they first appear."""
    columns = list(dict.fromkeys(column for values in figures.values() for column in values))
    what = "measure" if heading == "Quality" else "slice"
    lines = [f"| {what} | " + " | ".join(map(_inline, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, values in figures.items():
        cells = [_figure(values.get(column)) for column in columns]
        lines.append(f"| {_inline(row)} | " + " | ".join(cells) + " |")
    return f"## {heading}\n\n" + "\n".join(lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _drift(drift: Mapping[str, Any], name: str) -> str:
    """Against the version before: known when a version is released, which is after this page is written."""
    if not drift:
        return (
            "## Drift\n\nMeasured against the version before when this one is released: "
            f"`userrep tables show {name}@v12`."
        )
    lines = [f"| {_inline(what)} | {_inline(value)} |" for what, value in drift.items()]
    return "\n".join(["## Drift", "", "| what | value |", "|---|---|", *lines])


def _quantisation(error: Mapping[str, float]) -> str:
    return (
        "## Rounding\n\nVectors are int8 with a factor each (`userrep.publishing.vectors.float32_vectors` reads them). "
        f"Measured on {error['vectors']:,} vectors as they were rounded: mean cosine with the original "
        f"{error['mean_cosine']:.6f}, smallest {error['min_cosine']:.6f}, largest error of a value "
        f"{error['max_abs_error']:.2g}."
    )


def _coverage(facts: Mapping[str, Any], entity: Entity) -> str:
    counts = {f"{entity.name}s in the table": facts["rows"], **(facts.get("coverage") or {}), **_refreshed(facts)}
    if facts.get("erased"):
        counts["erased since it was made"] = facts["erased"]
    lines = [f"| {_inline(what)} | {count:,} |" for what, count in counts.items()]
    return "\n".join(["## Coverage", "", f"| what | {entity.name}s |", "|---|---|", *lines])


def _refreshed(facts: Mapping[str, Any]) -> dict[str, int]:
    """Whom a refresh has encoded again, where the table was made from an earlier one."""
    since = facts.get("refresh")
    if not since:
        return {}
    against = f"since table {str(since['since'])[:12]}"
    return {f"{what} {against}": since[what] for what in ("new", "changed", "unchanged", "removed")}


def _how_to_pull(name: str, facts: Mapping[str, Any], entity: Entity) -> str:
    recipe, tasks = RECIPE.format(name=name, alias="ALIAS", uri="TRACKING_URI", entity=entity.name), facts.get("tasks")
    if tasks:
        column = task_column(tasks[0])
        columns = ["user_id", column, *([scale_column(column)] if facts["dtype"] == "int8" else [])]
        recipe += ONE_COLUMN.format(columns=json.dumps(columns))
    return "\n".join(
        [
            "## How to pull it",
            "",
            "Every checksum is verified before the table appears; neither torch nor ray is needed.",
            "",
            "```sh",
            f"userrep pull {name}@ALIAS --to {name} --tracking-uri TRACKING_URI",
            "```",
            "",
            "```python",
            recipe,
            "```",
            "",
            f"A fixed version instead of an alias: `{name}@v12`.",
        ]
    )


def _inline(value: object) -> str:
    """Text that cannot break a Markdown table or a line."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("`", "'")
