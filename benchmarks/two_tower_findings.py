"""What runs of two-tower variants say: tables, paired differences, and whether the paper's findings are reproduced.

Source: Yao et al. 2021 (arXiv 2007.12865, sections 4.3 to 4.6).
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from userrep.evaluation.transfer import Interval, mean_interval

Run = dict[str, Any]
FAMILY = {"rfm": "rfm", "rfm_no_complement": "rfm", "so": "so"}  # whose alpha a variant takes; default: that of cfm
DEFAULT_DROPOUT = 0.3  # where the stage `dropout` was left out
CHOICE = "recall_at_50"  # of validation users
METRICS = ("recall_at_10", "recall_at_50", "map_at_10", "map_at_50")
SLICES = ("all", "head", "tail")
SELF_SUPERVISED = ("cfm", "cfm_no_complement", "cfm_no_dropout", "rfm", "rfm_no_complement", "no_masking")


def read_runs(path: Path) -> list[Run]:
    """Runs that a file of JSON lines holds; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(config: Run) -> str:
    """Text that is the same for the same run."""
    return json.dumps(config, sort_keys=True)


def chosen_alpha(runs: list[Run], dataset: str, share: float, name: str) -> float:
    """The weight with the best mean validation recall of the runs of the stage `alpha`.

    Raises:
        ValueError: there are none.
    """
    found = by_value(runs, "alpha", dataset, share, FAMILY.get(name, "cfm"))
    if not found:
        raise ValueError(f"no alpha was tried for {name} on {dataset}, share {share:g}: run the stage alpha before")
    return best(found)


def chosen_dropout(runs: list[Run], dataset: str, share: float, name: str) -> float:
    """The rate of dropout, likewise of the stage `dropout`: of features for `fd`, else of values, that of cfm."""
    found = by_value(runs, "dropout", dataset, share, "fd" if name == "fd" else "cfm")
    return best(found) if found else DEFAULT_DROPOUT


def by_value(runs: list[Run], stage: str, dataset: str, share: float, name: str) -> dict[float, list[Run]]:
    """Runs of a stage by the value that it tries."""
    found: dict[float, list[Run]] = defaultdict(list)
    for run in runs:
        config, loss = run["config"], run["config"]["loss"]
        if (config["stage"], config["dataset"], config["share"], config["variant"]) == (stage, dataset, share, name):
            rate = loss["feature_dropout"] if name == "fd" else loss["augmentation"]["value_dropout"]
            found[loss["alpha"] if stage == "alpha" else rate].append(run)
    return dict(sorted(found.items()))


def best(found: dict[float, list[Run]]) -> float:
    """The value with the best mean validation recall."""
    return max(found, key=lambda value: float(np.mean([run["validation"]["all"][CHOICE] for run in found[value]])))


@dataclass(frozen=True)
class Group:
    """Runs of the stage `compare` that differ in variant and seed alone."""

    dataset: str
    share: float
    runs: dict[str, dict[int, Run]]  # variant, seed

    @classmethod
    def of(cls, runs: list[Run], dataset: str, share: float) -> "Group":
        """Runs of a data set with a share of its samples; a later run counts before an earlier one."""
        found: dict[str, dict[int, Run]] = defaultdict(dict)
        for run in runs:
            config = run["config"]
            if (config["stage"], config["dataset"], config["share"]) == ("compare", dataset, share):
                found[config["variant"]][config["seed"]] = run
        return cls(dataset, share, dict(found))

    def scores(self, name: str, part: str, metric: str) -> dict[int, float]:
        """Of a variant on test users, by seed."""
        return {seed: run["test"][part][metric] for seed, run in sorted(self.runs.get(name, {}).items())}

    def mean(self, name: str, part: str = "all", metric: str = "recall_at_50") -> Interval:
        """With the 95% interval over seeds."""
        return mean_interval(np.array(list(self.scores(name, part, metric).values())))

    def gains(self, name: str, rival: str, part: str = "all", metric: str = "recall_at_50") -> np.ndarray:
        """Score minus that of the rival, over the rival's mean, seed by seed: a relative gain."""
        own, other = self.scores(name, part, metric), self.scores(rival, part, metric)
        seeds = sorted(own.keys() & other.keys())
        differences = np.array([own[seed] - other[seed] for seed in seeds])
        return differences / max(1e-12, float(np.mean(list(other.values()))))


@dataclass(frozen=True)
class Finding:
    """A claim as a difference that must be above 0.

    Attributes:
        claim: in words.
        differences: seed by seed.
    """

    claim: str
    differences: np.ndarray

    def line(self) -> str:
        """Row of a table: claim, mean and interval, verdict."""
        interval = mean_interval(self.differences)
        verdict = "reproduced" if interval.low > 0 else "the opposite" if interval.high < 0 else "not told apart"
        return f"| {self.claim} | {percent(interval)} | {verdict} |"


def findings(full: Group, tenth: Group | None, metric: str) -> list[Finding]:
    """The paper's claims, as relative gains over a rival.

    Args:
        full: runs with all training samples.
        tenth: runs with a part of them, if there are any.
        metric: by which.
    """
    found = []
    groups = [(group, f"{group.share:.0%} of the samples") for group in (full, tenth) if group is not None]
    for group, where in groups:
        for rival in ("plain", "so", "fd", "rfm", "rfm_no_complement", "no_masking", "cfm_no_dropout"):
            if rival in group.runs:
                found.append(Finding(f"cfm above {rival}, {where}", group.gains("cfm", rival, metric=metric)))
        gain = [group.gains("cfm", "plain", part, metric) for part in ("tail", "head")]
        found.append(Finding(f"the tail gains more than the head, {where}", gain[0] - gain[1]))
        rest = [name for name in SELF_SUPERVISED if name in group.runs and name != "rfm"]
        if "rfm" in group.runs and len(rest) > 1:
            worst = min(rest, key=lambda name: group.mean(name, metric=metric).mean)
            claim = f"{worst}, the worst other one, above rfm, {where}"
            found.append(Finding(claim, group.gains(worst, "rfm", metric=metric)))
    if tenth is not None:
        gain = [group.gains("cfm", "plain", metric=metric) for group in (tenth, full)]
        count = min(len(values) for values in gain)
        found.append(Finding("the gain of cfm is larger with few samples", gain[0][:count] - gain[1][:count]))
    return found


def percent(interval: Interval) -> str:
    """A relative gain for people; of one seed without an interval."""
    if interval.num_seeds == 1:
        return f"{100 * interval.mean:+.1f}%"
    return f"{100 * interval.mean:+.1f} ± {100 * (interval.high - interval.mean):.1f}%"


def plain(interval: Interval) -> str:
    """A score for people; of one seed without an interval."""
    if interval.num_seeds == 1:
        return f"{interval.mean:.4f}".lstrip("0")
    return f"{interval.mean:.4f} ± {interval.high - interval.mean:.4f}".replace("0.", ".")


def report(runs: list[Run]) -> str:
    """All tables as Markdown, data set by data set."""
    lines: list[str] = []
    for dataset in dict.fromkeys(run["config"]["dataset"] for run in runs):
        shares = sorted({run["config"]["share"] for run in runs if run["config"]["dataset"] == dataset}, reverse=True)
        lines += [f"## {dataset}", ""]
        for share in shares:
            lines += _on_the_way(runs, dataset, share)
            for stage, names in (("alpha", ("cfm", "rfm", "so")), ("dropout", ("cfm", "fd"))):
                for name in names:
                    lines += _choice(stage, name, by_value(runs, stage, dataset, share, name), share)
        groups = [group for group in (Group.of(runs, dataset, share) for share in shares) if "plain" in group.runs]
        for group in groups:
            lines += _scores(group)
        if groups and "cfm" in groups[0].runs:
            for metric in ("recall_at_50", "recall_at_10"):
                found = findings(groups[0], groups[1] if len(groups) > 1 else None, metric)
                lines += ["", f"| finding, by {metric} | relative gain | verdict |", "|---|---:|---|"]
                lines += [finding.line() for finding in found]
        lines.append("")
    return "\n".join(lines)


def _on_the_way(runs: list[Run], dataset: str, share: float) -> list[str]:
    found = [
        run
        for run in runs
        if (run["config"]["stage"], run["config"]["dataset"], run["config"]["share"]) == ("steps", dataset, share)
    ]
    return [
        f"plain, share {share:g}, batch {run['config']['batch_size']}: validation {CHOICE} after steps: "
        + ", ".join(f"{step} {scores[CHOICE]:.4f}" for step, scores in run["on_the_way"].items())
        for run in found
    ]


def _choice(stage: str, name: str, found: dict[float, list[Run]], share: float) -> list[str]:
    if not found:
        return []
    means = {value: np.mean([run["validation"]["all"][CHOICE] for run in runs]) for value, runs in found.items()}
    tried = ", ".join(f"{value:g}: {mean:.4f}" for value, mean in means.items())
    return [f"{stage} of {name}, share {share:g}: validation {CHOICE} {tried}"]


def _scores(group: Group) -> list[str]:
    columns = [("all", metric) for metric in METRICS] + [(part, "recall_at_50") for part in ("head", "tail")]
    lines = [
        "",
        f"Share {group.share:g} of the samples, test users:",
        "",
        "| variant | alpha | dropout | seeds | " + " | ".join(f"{part} {metric}" for part, metric in columns) + " |",
        "|---|---:|---:|---:|" + "---:|" * len(columns),
    ]
    for name, by_seed in group.runs.items():
        loss = next(iter(by_seed.values()))["config"]["loss"]
        alpha = "" if loss["regulariser"] == "none" else f"{loss['alpha']:g}"
        rate = loss["feature_dropout"] if name == "fd" else loss["augmentation"]["value_dropout"]
        dropout = "" if name in ("plain", "so") else f"{rate:g}"
        scores = " | ".join(plain(group.mean(name, part, metric)) for part, metric in columns)
        lines.append(f"| {name} | {alpha} | {dropout} | {len(by_seed)} | {scores} |")
    return lines
