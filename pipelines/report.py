"""`report.html`: what a job measured, on one page that needs no network, no scripts and no other file."""

import io
import os
import re
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from math import log
from typing import Any
from urllib.parse import urlsplit

import matplotlib
import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pipelines import pretrain
from pipelines.job import Job
from pipelines.mlflow_store import tracking_uri
from pipelines.verdict import UPPER_BOUNDS, compare_systems, format_share, interval, label, ranked, relation
from userrep.manifest import IncompleteTableError

REPORT_NAME = "report.html"
MAX_CURVE_POINTS = 1000  # of a line in a figure; keeps the page small
CONTRASTS = ("train/contrastive_loss", "train/main_loss", "train/loss")  # of Recformer, two-tower, CLUE
BUSY_LOAD = 2.0  # load average per core above which timings are marked; assumption: the job alone makes about 1.3

# Role -> a colour that is legible on white and on black. The page replaces it by the one of its colour scheme.
COLORS = {"ink": "#76797d", "rule": "#8c8f93", "accent": "#3d7edc", "second": "#d9702b", "bar": "#979ea6"}
INK_KEYS = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color")
FIGURE_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, the page's own font
    "svg.hashsalt": "report",  # equal input, equal bytes
    "text.parse_math": False,
    "font.size": 9,
    **dict.fromkeys(INK_KEYS, COLORS["ink"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), COLORS["rule"]),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **{"grid.alpha": 0.25, "grid.linewidth": 0.6, "hatch.linewidth": 0.6},
}


def write_report(job: Job, summary: dict[str, Any]) -> None:
    """Writes `report.html` into the working directory; a reader sees the old page or the complete new one.

    Args:
        job: where the tables are; the training curves are read from the encoder's manifest.
        summary: what `summary.json` holds. Sections that are missing are left out of the page.
    """
    environment = Environment(loader=PackageLoader("pipelines", "."), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"count": "{:,}".format, "duration": format_seconds, "share": format_share}
    html = environment.get_template("report.html.j2").render(_context(job, summary))
    path = job.workdir / REPORT_NAME
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)


def _context(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
    sections = {name: summary.get(name) or {} for name in ("pretrain", "tasks", "data", "table", "pull", "environment")}
    encoder, environment = sections["pretrain"], sections["environment"]
    systems = {"encoder": encoder} | summary.get("baselines", {}) if "recall_at_10" in encoder else {}
    try:
        facts = job.manifest(pretrain.TABLE).facts
    except IncompleteTableError:
        facts = {}
    curve, config = facts.get("curve", []), job.config.pretrain
    with matplotlib.rc_context(FIGURE_STYLE):
        figures = {
            "retrieval": _retrieval_figure(systems, encoder["pool"]) if systems else None,
            "training": _training_figure(curve, config.global_batch_size, config.pool_size) if curve else None,
            "throughput": _throughput_figure(curve, config.global_batch_size) if curve else None,
            "stages": _stages_figure(summary["stages"]) if summary.get("stages") else None,
        }
    return {
        **sections,
        "summary": summary,
        "is_busy": environment.get("load_average_1m", 0) > BUSY_LOAD * environment.get("cores", 1),
        "name": summary.get("config", job.config.name),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": compare_systems(systems),
        "figures": figures,
        "systems": [(name, label(name), systems[name], relation(systems, name)) for name in ranked(systems)],
        "batch_size": config.global_batch_size,
        "validation_pool": config.pool_size,
        "run_name": facts.get("run_name"),
        "pull_commands": _pull_commands(job, sections["table"]) if sections["table"] else [],
        "config": yaml.safe_dump(job.config.model_dump(mode="json"), sort_keys=False),
    }


def _retrieval_figure(systems: dict[str, dict[str, float]], pool: int) -> Markup:
    names, chance = ranked(systems), min(1.0, 10 / pool)
    figure, axes = _bar_figure([f"{label(name)}\n{interval(systems[name])}" for name in names], 0.45)
    for row, name in enumerate(names):
        value, low, high = (systems[name][f"recall_at_10{end}"] for end in ("", "_low", "_high"))
        if name in UPPER_BOUNDS:
            axes.barh(row, value, 0.55, fill=False, edgecolor=COLORS["bar"], linestyle="--")
        else:
            axes.barh(row, value, 0.55, color=COLORS["accent" if name == "encoder" else "bar"])
        axes.plot([low, high], [row, row], "|-", color=COLORS["ink"], markersize=8, linewidth=1.4)
    axes.axvline(chance, color=COLORS["second"], linestyle=":", linewidth=1.4)
    axes.text(chance, -0.55, f"chance {format_share(chance)}", ha="center", va="bottom", color=COLORS["second"])
    axes.set_xlim(0, min(1.02, 1.1 * max(chance, *(system["recall_at_10_high"] for system in systems.values()))))
    axes.set_xlabel(f"recall@10 among {pool:,} users")
    spoken = "; ".join(f"{label(n)} {format_share(systems[n]['recall_at_10'])} {interval(systems[n])}" for n in names)
    return inline_svg(
        figure, "retrieval", f"Recall at 10 with 95% intervals: {spoken}. Chance is {format_share(chance)}."
    )


def _training_figure(curve: list[dict[str, Any]], batch_size: int, pool: int) -> Markup:
    figure = Figure(figsize=(4.5, 4.6), layout="constrained")
    losses, recalls = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    # Of a loss of several parts the one that chance is known of.
    contrast = next(key for key in CONTRASTS if key in curve[0]["metrics"])
    steps, loss = _series(curve, contrast)
    val_steps, val_loss = _series(curve, "val/loss")
    recall, chance = _series(curve, "val/recall_at_10")[1], min(1.0, 10 / pool)
    _plot_smoothed(losses, steps, loss, "accent", "train")
    _plot_chance(losses, log(batch_size), "accent", f"train chance, log({batch_size:,})")
    losses.plot(val_steps, val_loss, "o-", color=COLORS["second"], markersize=4, linewidth=1.2, label="validation")
    _plot_chance(losses, log(pool), "second", f"validation chance, log({pool:,})")
    # Until the temperature has adapted, the loss is far above chance; those steps would flatten the rest.
    shown = np.concatenate([loss[len(loss) // 10 :], val_loss, [log(batch_size), log(pool)]])
    margin = 0.06 * max(1e-3, float(np.ptp(shown)))
    losses.set(ylabel="loss, nats", ylim=(shown.min() - margin, shown.max() + margin))
    recalls.plot(val_steps, recall, "o-", color=COLORS["second"], markersize=4, linewidth=1.2)
    _plot_chance(recalls, chance, "second")
    recalls.set(ylabel="recall@10", ylim=(0, 1.15 * max(chance, *recall, 0.0)))
    _name_steps(recalls, steps)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    spoken = f"Train loss by step, from {loss[0]:.3f} to {loss[-1]:.3f}; chance {log(batch_size):.3f}."
    if len(val_loss):
        spoken += (
            f" Validation: loss {val_loss[-1]:.3f}, chance {log(pool):.3f}; recall at 10 {format_share(recall[-1])}."
        )
    return inline_svg(figure, "training", spoken)


def _throughput_figure(curve: list[dict[str, Any]], batch_size: int) -> Markup:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    rates, waits = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, step_s = np.maximum(_series(curve, "time/step_s"), 1e-9)
    _, wait_s = _series(curve, "time/input_wait_s")
    users_per_s, percent = batch_size / step_s, 100 * wait_s / (wait_s + step_s)
    _plot_smoothed(rates, steps, users_per_s, "accent")
    _plot_smoothed(waits, steps, percent, "second")
    rates.set(ylabel="users/s", ylim=(0, 1.1 * users_per_s.max()))
    rates.yaxis.set_major_formatter("{x:,.0f}")
    waits.set(ylabel="input wait, %", ylim=(0, 100))
    _name_steps(waits, steps)
    spoken = f"Median {np.median(users_per_s):,.0f} users per second and {np.median(percent):.1f}% input wait per step."
    return inline_svg(figure, "throughput", spoken)


def _stages_figure(stages: dict[str, dict[str, Any]]) -> Markup:
    figure, axes = _bar_figure(list(stages), 0.34)
    solid: dict[str, Any] = {"color": COLORS["accent"]}
    texts = [format_seconds(s["seconds"]) + (", skipped" if s["skipped"] else "") for s in stages.values()]
    for row, (stage, text) in enumerate(zip(stages.values(), texts, strict=True)):
        look = {"fill": False, "edgecolor": COLORS["bar"], "hatch": "////"} if stage["skipped"] else solid
        axes.barh(row, stage["seconds"], 0.6, **look)
        axes.annotate(text, (stage["seconds"], row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set(xlabel="seconds", xlim=(0, 1.45 * max(1e-3, *(stage["seconds"] for stage in stages.values()))))
    axes.xaxis.set_major_formatter("{x:,g}")
    spoken = "; ".join(f"{name} {text}" for name, text in zip(stages, texts, strict=True))
    return inline_svg(figure, "stages", f"Time of each stage: {spoken}.")


def _bar_figure(labels: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 0.6 + row_height * len(labels)), layout="constrained")  # narrow: legible on a phone
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _series(curve: list[dict[str, Any]], key: str) -> np.ndarray:
    """Steps and values of a metric where it was measured and finite, (2, N)."""
    points = np.array([(point["step"], point["metrics"].get(key, np.nan)) for point in curve], dtype=float).reshape(
        -1, 2
    )
    return points[np.isfinite(points[:, 1])].T


def _plot_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, name: str = "") -> None:
    """A light line of every value, and a strong one of the mean over the nearest 5% of them."""
    half, index = max(1, len(values) // 40), np.arange(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    kept = slice(None, None, -(-len(values) // MAX_CURVE_POINTS))
    axes.plot(steps[kept], values[kept], color=COLORS[color], linewidth=0.8, alpha=0.45, label=f"{name}, every step")
    smooth = (total[last] - total[first]) / (last - first)
    axes.plot(steps[kept], smooth[kept], color=COLORS[color], linewidth=1.8, label=f"{name}, smoothed")


def _plot_chance(axes: Axes, level: float, color: str, label: str = "") -> None:
    axes.axhline(level, color=COLORS[color], linestyle=":", linewidth=1.4, label=label)


def _name_steps(axes: Axes, steps: np.ndarray) -> None:
    axes.set(xlabel="step", xlim=(0, 1.02 * steps[-1]))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def inline_svg(figure: Figure, name: str, spoken: str) -> Markup:
    """Renders a figure as an inline element: ids of its own, the page's font and colours, text for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    view_box = re.search(r'viewBox="([^"]+)"', svg)
    assert view_box is not None, "matplotlib writes a viewBox"
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index(">", view_box.end()) + 1 :], flags=re.DOTALL)
    body = re.sub(r' id="|(?<=href=")#|(?<=url\()#', lambda match: f"{match[0]}{name}-", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for role, color in COLORS.items():
        body = body.replace(color, f"var(--{role}, {color})")
    opening = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(view_box[1], spoken)
    return opening + Markup(body)  # text inside was escaped by matplotlib


def _pull_commands(job: Job, table: dict[str, Any]) -> list[tuple[str, str]]:
    """Purpose and command line; without the password that a tracking URI may hold."""
    uri, name = tracking_uri(job.workdir), table["name"]
    if (parts := urlsplit(uri)).netloc:
        uri = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()
    purposes = {"The version that the alias names": table["alias"], "Exactly this version": f"v{table['version']}"}
    options = ["--to", name, "--tracking-uri", uri]
    return [(why, shlex.join(["userrep", "pull", f"{name}@{end}", *options])) for why, end in purposes.items()]


def format_seconds(seconds: float) -> str:
    """A duration: 0.03 s, 5.4 s, 2 min 5 s, 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
