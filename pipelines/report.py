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

from pipelines import pretrain
from pipelines.job import Job
from pipelines.mlflow_store import tracking_uri
from userrep.manifest import IncompleteTableError

REPORT_NAME = "report.html"
TEMPLATE_NAME = "report.html.j2"
LABELS = {"tfidf": "TF-IDF", "bag_of_tokens": "bag of tokens", "oracle": "oracle (upper bound)"}
UPPER_BOUNDS = ("oracle",)  # knows how the synthetic world was generated: a ceiling, not a competitor
MAX_CURVE_POINTS = 1000  # of a line in a figure; keeps the page small

# Role -> a colour that is legible on white and on black. The page replaces it by the one of its colour scheme.
COLORS = {"ink": "#76797d", "rule": "#8c8f93", "accent": "#3d7edc", "second": "#d9702b", "bar": "#979ea6"}
INK_KEYS = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "hatch.color")
FIGURE_STYLE: dict[str, Any] = {
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
    environment = Environment(
        loader=PackageLoader("pipelines", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "duration": format_seconds, "share": format_share, "gib": format_gib}
    html = environment.get_template(TEMPLATE_NAME).render(_context(job, summary))
    path = job.workdir / REPORT_NAME
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(html)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _context(job: Job, summary: dict[str, Any]) -> dict[str, Any]:
    encoder = summary.get("pretrain", {})
    systems = {"encoder": encoder} | summary.get("baselines", {}) if "recall_at_10" in encoder else {}
    try:
        facts = job.manifest(pretrain.TABLE).facts
    except IncompleteTableError:
        facts = {}
    curve, config = facts.get("curve", []), job.config.pretrain
    has_validation = any("val/loss" in point["metrics"] for point in curve)
    headline, verdict = compare_systems(systems)
    with matplotlib.rc_context(FIGURE_STYLE):
        figures = {
            "retrieval": _retrieval_figure(systems, encoder["pool"]) if systems else None,
            "loss": _loss_figure(curve, config.global_batch_size, config.pool_size) if curve else None,
            "recall": _recall_figure(curve, config.pool_size) if has_validation else None,
            "throughput": _throughput_figure(curve, config.global_batch_size) if curve else None,
            "stages": _stages_figure(summary["stages"]) if summary.get("stages") else None,
        }
    return {
        "summary": summary,
        "name": summary.get("config", job.config.name),
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headline": headline,
        "verdict": verdict,
        "figures": figures,
        "systems": [
            {"name": _label(name), "interval": _interval(systems[name]), "relation": _relation(systems, name)} | systems[name]
            for name in _ranked(systems)
        ],
        "validation_pool": config.pool_size,
        "run_id": facts.get("run_id"),
        "pull_commands": _pull_commands(job, summary["table"]) if summary.get("table") else [],
        "config": yaml.safe_dump(job.config.model_dump(mode="json"), sort_keys=False),
    }


def compare_systems(systems: dict[str, dict[str, float]]) -> tuple[str, str]:
    """The verdict in words: a headline, and recall@10 of the encoder against every baseline.

    A system counts as above another only where their 95% intervals do not overlap, which is stricter than a test of
    the difference on the same users.

    Args:
        systems: name -> `recall_at_10`, `recall_at_10_low`, `recall_at_10_high`; `encoder` among the names, or empty.
    """
    if not systems:
        return "Not evaluated", "There is no retrieval result."
    encoder = systems["encoder"]
    groups: dict[str, list[str]] = {"above": [], "not clearly above": [], "below": []}
    for name in _ranked(systems):
        if name != "encoder" and name not in UPPER_BOUNDS:
            groups[_relation(systems, name)].append(name)
    phrases = []
    for relation, names in groups.items():
        rivals = [f"{_label(name)} ({format_share(systems[name]['recall_at_10'])})" for name in names]
        if rivals:
            phrases.append(f"{relation} {' and '.join([', '.join(rivals[:-1]), rivals[-1]] if rivals[1:] else rivals)}")
    overlap = " (95% intervals overlap)" if groups["not clearly above"] else ""
    text = "; ".join(phrases).replace("not clearly above", f"not clearly above{overlap}") or "no baseline was evaluated"
    worst = next((relation for relation in ("below", "not clearly above", "above") if groups[relation]), None)
    headline = f"{(worst or '').capitalize()} {_label(groups[worst][0])}" if worst else "No baseline to compare with"
    if worst == "above":
        headline = "Above every baseline"
    return headline, f"recall@10 {format_share(encoder['recall_at_10'])} {_interval(encoder)}: {text}."


def _relation(systems: dict[str, dict[str, float]], name: str) -> str:
    """How the encoder stands to a system: `above`, `below` or `not clearly above`."""
    encoder, other = systems["encoder"], systems[name]
    if encoder["recall_at_10_low"] > other["recall_at_10_high"]:
        return "above"
    return "below" if encoder["recall_at_10_high"] < other["recall_at_10_low"] else "not clearly above"


def _ranked(systems: dict[str, dict[str, float]]) -> list[str]:
    """The encoder, the baselines from the strongest to the weakest, the upper bounds."""
    return sorted(systems, key=lambda name: (name in UPPER_BOUNDS, name != "encoder", -systems[name]["recall_at_10"]))


def _retrieval_figure(systems: dict[str, dict[str, float]], pool: int) -> Markup:
    names, chance = _ranked(systems), min(1.0, 10 / pool)
    figure, axes = _bar_figure([f"{_label(name)}\n{_interval(systems[name])}" for name in names], 0.45)
    for row, name in enumerate(names):
        value, low, high = (systems[name][f"recall_at_10{end}"] for end in ("", "_low", "_high"))
        if name in UPPER_BOUNDS:
            axes.barh(row, value, 0.55, fill=False, edgecolor=COLORS["bar"], linestyle="--")
        else:
            axes.barh(row, value, 0.55, color=COLORS["accent" if name == "encoder" else "bar"])
        axes.plot([low, high], [row, row], "|-", color=COLORS["ink"], markersize=8, linewidth=1.4)
    axes.axvline(chance, color=COLORS["second"], linestyle=":", linewidth=1.4)
    label = f"chance {format_share(chance)}"
    axes.annotate(label, (chance, 1), xycoords=axes.get_xaxis_transform(), ha="center", va="bottom", color=COLORS["second"])
    highest = max(chance, *(system["recall_at_10_high"] for system in systems.values()))
    axes.set_xlim(0, min(1.02, 1.1 * highest))
    axes.set_xlabel(f"recall@10 among {pool:,} users")
    spoken = "; ".join(f"{_label(n)} {format_share(systems[n]['recall_at_10'])} {_interval(systems[n])}" for n in names)
    return _svg(figure, "retrieval", f"Recall at 10 with 95% intervals: {spoken}. Chance is {format_share(chance)}.")


def _loss_figure(curve: list[dict[str, Any]], batch_size: int, pool: int) -> Markup:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    steps, losses = _series(curve, "train/loss")
    val_steps, val_losses = _series(curve, "val/loss")
    _plot_smoothed(axes, steps, losses, "accent", "train")
    axes.plot(val_steps, val_losses, "o-", color=COLORS["second"], markersize=4, linewidth=1, label="validation")
    for size, color, name in ((batch_size, "accent", "train"), (pool, "second", "validation")):
        label = f"chance, {name}: log({size:,}) = {log(size):.2f}"
        axes.axhline(log(size), color=COLORS[color], linestyle=":", linewidth=1.2, label=label)
    # Until the temperature has adapted, the loss is far above chance; those steps would flatten the rest.
    shown = np.concatenate([losses[len(losses) // 10 :], val_losses, [log(batch_size), log(pool)]])
    margin = 0.06 * max(1e-3, float(np.ptp(shown)))
    axes.set_ylim(shown.min() - margin, shown.max() + margin)
    axes.set_ylabel("loss (nats)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    _name_steps(axes, steps)
    spoken = f"Train loss from {losses[0]:.3f} to {losses[-1]:.3f} in {steps[-1]:,.0f} steps; chance {log(batch_size):.3f}."
    if len(val_losses):
        spoken += f" Validation loss from {val_losses[0]:.3f} to {val_losses[-1]:.3f}; chance {log(pool):.3f}."
    return _svg(figure, "loss", spoken)


def _recall_figure(curve: list[dict[str, Any]], pool: int) -> Markup:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    axes = figure.subplots()
    steps, recalls = _series(curve, "val/recall_at_10")
    chance = min(1.0, 10 / pool)
    axes.plot(steps, recalls, "o-", color=COLORS["second"], markersize=4, linewidth=1.4, label="validation")
    axes.axhline(chance, color=COLORS["ink"], linestyle=":", linewidth=1.2, label=f"chance, 10/{pool:,}")
    axes.set_ylim(0, 1.15 * max(chance, recalls.max()))
    axes.set_ylabel("recall@10")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    _name_steps(axes, steps)
    ends = f"{format_share(recalls[0])} to {format_share(recalls[-1])}"
    return _svg(figure, "recall", f"Validation recall at 10 by step, from {ends}; chance {format_share(chance)}.")


def _throughput_figure(curve: list[dict[str, Any]], batch_size: int) -> Markup:
    figure = Figure(figsize=(4.5, 3.2), layout="constrained")
    rates, waits = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, step_s = np.maximum(_series(curve, "time/step_s"), 1e-9)
    _, wait_s = _series(curve, "time/input_wait_s")
    users_per_s, percent = batch_size / step_s, 100 * wait_s / (wait_s + step_s)
    _plot_smoothed(rates, steps, users_per_s, "accent")
    _plot_smoothed(waits, steps, percent, "second")
    rates.set_ylim(0, 1.1 * users_per_s.max())
    rates.set_ylabel("users/s")
    rates.yaxis.set_major_formatter("{x:,.0f}")
    waits.set_ylim(0, 100)
    waits.set_ylabel("input wait, %")
    _name_steps(waits, steps)
    spoken = f"Median {np.median(users_per_s):,.0f} users per second and {np.median(percent):.1f}% input wait per step."
    return _svg(figure, "throughput", spoken)


def _stages_figure(stages: dict[str, dict[str, Any]]) -> Markup:
    figure, axes = _bar_figure(list(stages), 0.34)
    texts = [format_seconds(s["seconds"]) + (", skipped" if s["skipped"] else "") for s in stages.values()]
    for row, (stage, text) in enumerate(zip(stages.values(), texts, strict=True)):
        hollow = {"fill": False, "edgecolor": COLORS["bar"], "hatch": "////"}
        axes.barh(row, stage["seconds"], 0.6, **(hollow if stage["skipped"] else {"color": COLORS["accent"]}))
        axes.annotate(text, (stage["seconds"], row), xytext=(5, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.45 * max(1e-3, *(stage["seconds"] for stage in stages.values())))
    axes.set_xlabel("seconds")
    spoken = "; ".join(f"{name} {text}" for name, text in zip(stages, texts, strict=True))
    return _svg(figure, "stages", f"Time of each stage: {spoken}.")


def _bar_figure(labels: Sequence[str], row_height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.5, 0.6 + row_height * len(labels)), layout="constrained")  # narrow: legible on a phone
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    return figure, axes


def _series(curve: list[dict[str, Any]], key: str) -> np.ndarray:
    """Steps and values of a metric where it was measured, (2, N)."""
    points = [(point["step"], point["metrics"][key]) for point in curve if key in point["metrics"]]
    return np.array(points, dtype=float).reshape(-1, 2).T


def _plot_smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, name: str = "") -> None:
    """A light line of every value, and a strong one of the mean over the nearest 5% of them."""
    half, index = max(1, len(values) // 40), np.arange(len(values))
    total = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    kept = slice(None, None, -(-len(values) // MAX_CURVE_POINTS))
    axes.plot(steps[kept], values[kept], color=COLORS[color], linewidth=0.8, alpha=0.45, label=f"{name}, every step")
    smooth = (total[last] - total[first]) / (last - first)
    axes.plot(steps[kept], smooth[kept], color=COLORS[color], linewidth=1.8, label=f"{name}, smoothed")


def _name_steps(axes: Axes, steps: np.ndarray) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(0, 1.02 * steps[-1])
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _svg(figure: Figure, name: str, spoken: str) -> Markup:
    """Renders a figure as an inline element: ids of its own, the page's font and colours, a text for screen readers."""
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
    """What follows a version and how to get it; without a password that the tracking URI may hold."""
    uri = tracking_uri(job)
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        uri = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    command = "userrep pull {} --to " + shlex.quote(table["name"]) + f" --tracking-uri {shlex.quote(uri)}"
    references = {f"{table['name']}@{table['alias']}": "newest", f"{table['name']}@v{table['version']}": "exactly this version"}
    return [(meaning, command.format(shlex.quote(reference))) for reference, meaning in references.items()]


def _label(name: str) -> str:
    return LABELS.get(name, name.replace("_", " "))


def _interval(system: dict[str, float]) -> str:
    return f"[{format_share(system['recall_at_10_low'])}, {format_share(system['recall_at_10_high'])}]"


def format_share(value: float) -> str:
    """Three decimals, without a leading zero: .432, 1.000."""
    return f"{value:.3f}".removeprefix("0") if value >= 0 else f"{value:.3f}"


def format_gib(num_bytes: float) -> str:
    """Bytes as GiB."""
    return f"{num_bytes / 2**30:,.2f} GiB"


def format_seconds(seconds: float) -> str:
    """A duration: 0.03 s, 5.4 s, 2 min 5 s, 1 h 12 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
