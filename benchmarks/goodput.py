"""Goodput under a kill a minute: `python -m benchmarks.goodput --workdir DIR [--every S] [--steps N] [--json FILE]`.

A run of the chaos job that is long enough, once undisturbed and once with a SIGKILL of a random worker every so many
seconds. Goodput is useful steps over all steps; the share of time that was not lost is shown beside it.
"""

import argparse
import random
import shutil
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.harness import Report
from pipelines.chaos import chaos_config
from pipelines.chaos_rig import Rig, kill, prepare_job, wait_until
from pipelines.chaos_run import Run
from pipelines.chaos_verdict import count_starts, find_differences, read_outcome
from pipelines.mlflow_store import local_tracking_uri
from pipelines.pretrain import checkpoint_interval_s
from pipelines.tokenize import TABLE as SHARDS
from userrep.training.tracking import SPOOL_NAME

MIN_GOODPUT = 0.9
RUN_LIMIT_S = 3600


def train(rig: Rig, workdir: Path, name: str, config_json: str, every_s: float, seed: int) -> tuple[Run, list[int]]:
    """One run. Returns it, and unix milliseconds of the kills; none with `every_s=0`."""
    run = Run(rig, prepare_job(workdir / name, config_json, workdir / "data" / SHARDS), local_tracking_uri(workdir))
    rng, kills = random.Random(seed), []
    run.issue()
    wait_until(lambda: run.step() > 0 or not run.is_running, RUN_LIMIT_S)
    while not wait_until(lambda: not run.is_running, every_s or RUN_LIMIT_S):
        if workers := run.workers():
            kill(rng.choice(workers))
            kills.append(time.time_ns() // 1_000_000)
    if run.num_commands > 1 or run.command is None or run.command.process.returncode:
        raise RuntimeError(f"the run has failed, see {run.job_dir / 'command.log'}")
    return run, kills


def measure(workdir: Path, arguments: argparse.Namespace, report: Report) -> None:
    """Both runs, their comparison and the verdicts."""
    config = chaos_config().with_overrides([f"pretrain.num_steps={arguments.steps}", "pretrain.validate_every=100"])
    text, uri = config.model_dump_json(), local_tracking_uri(workdir)
    (workdir / "data").mkdir()
    (workdir / "data" / "config.json").write_text(text)
    with (
        tempfile.TemporaryDirectory(prefix="goodput-", ignore_cleanup_errors=True) as ray_dir,
        Rig(workdir, Path(ray_dir), num_nodes=1) as rig,
    ):
        for stage in ("ingest", "tokenize"):
            if rig.issue(stage, workdir / "data", uri).process.wait(RUN_LIMIT_S):
                raise RuntimeError(f"{stage} failed, see {workdir / 'data' / 'command.log'}")
        calm, _ = train(rig, workdir, "undisturbed", text, 0, arguments.seed)
        run, kills = train(rig, workdir, "disturbed", text, arguments.every, arguments.seed)
    steps = config.pretrain.num_steps
    outcome, undisturbed = read_outcome(run.run_dir, steps), read_outcome(calm.run_dir, steps)
    facts = describe(outcome.lines, undisturbed.lines)
    facts["kills"], facts["checkpoint_interval_s"] = len(kills), checkpoint_interval_s(run.run_dir / SPOOL_NAME)
    report.line("goodput", every_s=arguments.every, steps=steps, **facts)
    report.console.print(facts)
    report.verdict("useful steps over all steps", facts["goodput"], MIN_GOODPUT, "at least")
    differences = find_differences(undisturbed, outcome, steps)
    report.verdict(f"differences from the undisturbed run {differences}", len(differences), 0, "at most")


def describe(lines: list[dict[str, Any]], calm: list[dict[str, Any]]) -> dict[str, Any]:
    """Steps, starts and times of a run beside those of the undisturbed one."""
    useful = len({line["step"] for line in lines})
    seconds = (lines[-1]["time_ms"] - lines[0]["time_ms"]) / 1000
    calm_s = (calm[-1]["time_ms"] - calm[0]["time_ms"]) / 1000
    pauses = [b["time_ms"] - a["time_ms"] for a, b in pairwise(lines) if b["attempt"] != a["attempt"]]
    return {
        "goodput": round(useful / len(lines), 4),
        "steps_taken": len(lines),
        "starts": count_starts(lines),
        "seconds": seconds,
        "undisturbed_s": calm_s,
        "time_share": round(calm_s / seconds, 3),
        "pause_s": [pause / 1000 for pause in pauses],
    }


def main() -> None:
    """Runs the measurement and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, help="new directory; default: a temporary one")
    parser.add_argument("--every", type=float, default=60.0, help="seconds from kill to kill")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    report = Report("goodput", arguments.json, ("ray",))
    workdir = (arguments.workdir or Path(tempfile.mkdtemp(prefix="goodput-"))).resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    measure(workdir, arguments, report)
    if arguments.workdir is None:
        shutil.rmtree(workdir)


if __name__ == "__main__":
    main()
