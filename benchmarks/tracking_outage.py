"""Training while MLflow is away: `python -m benchmarks.tracking_outage [--shards DIR] [--rounds N] [--json FILE]`.

Three cases alternate, each a run of 100 steps on two cores with a real MLflow server: it is there all the time; it is
killed at step 10 and back at step 80; it takes requests and never answers, from before the start until after the end.
Claims: neither lengthens steps 11 to 80, the time to the first step, or the time after the last one by more than the
few seconds that a run waits for MLflow; MLflow has 100 points of every metric of a step at the end of the run, where it
is back, and otherwise after `userrep sync-tracking`.
"""

import argparse
import os
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness import MAX_OTHERS, Report
from benchmarks.input_pipeline import CORES, CpuMonitor, make_shards, two_cores
from pipelines.config import JobConfig, PublishConfig
from pipelines.console import Console
from pipelines.job import Job
from pipelines.tracking import RUNS, tracked
from tests.support.mlflow_server import MlflowServer
from userrep.models.clue import ClueConfig
from userrep.publishing.connection import connect
from userrep.training.follower import DRAIN_S
from userrep.training.launch import train
from userrep.training.replay import find_run, send_run
from userrep.training.run_record import RunRecord
from userrep.training.settings import CluePretraining, WorkersConfig
from userrep.training.tracking import SPOOL_NAME, SpoolReader

NUM_STEPS, AWAY_FROM, AWAY_UNTIL = 100, 10, 80
MAX_STEP_RATIO = 1.05  # of the median step with an outage over that without
MAX_LATER_S = 1.0  # assumption: what the start of Ray differs by
POLL_S = 0.05

# What is done to the server, and at which step; where the run does not come to the step, when it has ended.
Case = list[tuple[int, Callable[[MlflowServer], None]]]
CASES: dict[str, Case] = {
    "there": [],
    "killed": [(AWAY_FROM, MlflowServer.kill), (AWAY_UNTIL, MlflowServer.start)],
    "hanging": [
        (0, lambda server: server.send(signal.SIGSTOP)),
        (NUM_STEPS + 1, lambda server: server.send(signal.SIGCONT)),
    ],
}


def measure_run(name: str, shards: Path, workdir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run.

    Returns:
        Seconds from step to step, 11 to 80 (`step_s`), from the start to the first point (`start_s`), from the last
        point to the end (`end_s`); the fewest points that a metric of a step has in MLflow when the run has ended, and
        after `userrep sync-tracking`; `others`: share of the cores that processes of others used.
    """
    config = CluePretraining(
        model=ClueConfig(dim=arguments.dim),
        global_batch_size=arguments.batch_size,
        num_steps=NUM_STEPS,
        validate_every=NUM_STEPS // 2,
        pool_size=64,
    )
    job = Job(JobConfig(pretrain=config, publish=PublishConfig(experiment="outage")), workdir, Console())
    run_dir = workdir / RUNS / name
    run_dir.mkdir(parents=True)
    with MlflowServer(workdir) as server, CpuMonitor() as monitor:
        os.environ["MLFLOW_TRACKING_URI"] = server.uri
        over = threading.Event()
        outage = threading.Thread(target=_make_outage, args=(run_dir / SPOOL_NAME, server, CASES[name], over))
        outage.start()
        started = time.time()
        try:
            with tracked(job, run_dir, config.model_dump(mode="json")):
                train(shards, run_dir, config, WorkersConfig(threads=CORES - 1))
        finally:
            ended = time.time()
            over.set()
            outage.join()
        at_end = _fewest_points(server.uri, run_dir)
        send_run(run_dir, server.uri, waits=True)
        after_sync = _fewest_points(server.uri, run_dir)
    points = SpoolReader(run_dir / SPOOL_NAME).read()
    times = [point["time_ms"] / 1e3 for point in points]
    cpu_s, machine_s = monitor.between(times[0], times[-1])
    return {
        "case": name,
        # From point to point: what tracking held up would not be in the time of the step alone.
        "step_s": [
            (point["time_ms"] - before["time_ms"]) / 1e3
            for before, point in pairwise(points)
            if AWAY_FROM < point["step"] <= AWAY_UNTIL
        ],
        "start_s": times[0] - started,
        "end_s": ended - times[-1],
        "points_at_end": at_end,
        "points_after_sync": after_sync,
        "others": max(0.0, machine_s - cpu_s) / (CORES * (times[-1] - times[0])),
        "load": os.getloadavg()[0],
    }


def _make_outage(spool: Path, server: MlflowServer, case: Case, over: threading.Event) -> None:
    reader, step = SpoolReader(spool), 0
    for limit, act in case:
        while step < limit and not over.wait(POLL_S):
            for point in reader.read():
                step = point["step"]
        act(server)


def _fewest_points(uri: str, run_dir: Path) -> int:
    """In MLflow, of the metrics that every step has in the spool."""
    points = [set(point["metrics"]) for point in SpoolReader(run_dir / SPOOL_NAME).read()]
    with connect(uri) as client:
        run_id = find_run(client, "outage", RunRecord.read(run_dir).key)
        if run_id is None:
            return 0
        histories = [client.get_metric_history(run_id, key) for key in set.intersection(*points)]
    counts = [Counter(point.step for point in history) for history in histories]
    assert all(set(steps.values()) == {1} for steps in counts), "a step stands twice in MLflow"
    return min(len(steps) for steps in counts)


def show(report: Report, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Table and verdicts, over rounds."""
    table = Table("MLflow", title=f"{NUM_STEPS} steps; killed at step {AWAY_FROM}, back at step {AWAY_UNTIL}")
    for column in ("step ms", "start s", "end s", "points at end", "after sync", "others"):
        table.add_column(column, justify="right")
    for name, mine in runs.items():
        for run in mine:
            step_ms = 1e3 * statistics.median(run["step_s"])
            times = f"{step_ms:.1f}", f"{run['start_s']:.1f}", f"{run['end_s']:.1f}"
            table.add_row(
                name, *times, str(run["points_at_end"]), str(run["points_after_sync"]), f"{run['others']:.0%}"
            )
    report.console.print(table)
    busy = max(run["others"] for mine in runs.values() for run in mine)
    reason = f"other processes used {busy:.0%} of two cores" if busy > MAX_OTHERS else None
    for name, counted in (("killed", "points_at_end"), ("hanging", "points_after_sync")):
        pairs = list(zip(runs[name], runs["there"], strict=True))
        ratios = [statistics.median(away["step_s"]) / statistics.median(there["step_s"]) for away, there in pairs]
        claim = f"median step, MLflow {name} over MLflow there"
        report.verdict(claim, statistics.median(ratios), MAX_STEP_RATIO, "at most", reason, highest=max(ratios))
        for key, what, bar in (
            ("start_s", "the first step comes", MAX_LATER_S),
            ("end_s", "the run ends", MAX_LATER_S + DRAIN_S),
        ):
            later_s = [away[key] - there[key] for away, there in pairs]
            claim = f"{what} so many seconds later, MLflow {name}"
            report.verdict(claim, statistics.median(later_s), bar, "at most", reason, highest=max(later_s))
        fewest = min(run[counted] for run in runs[name])
        report.verdict(f"{counted.replace('_', ' ')} of every metric, MLflow {name}", fewest, NUM_STEPS, "at least")


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, help="tokenized table of a job; default: synthetic users")
    parser.add_argument("--users", type=int, default=8_000, help="synthetic")
    parser.add_argument("--batch-size", type=int, default=1_024, help="20 steps must outlast a start of MLflow")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each case; their order alternates")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    report = Report("tracking_outage", arguments.json, ("ray", "mlflow"))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shards = arguments.shards.resolve() if arguments.shards else make_shards(arguments.users, directory / "job")
        with two_cores():
            for turn in range(arguments.rounds):
                order = list(CASES)[turn % len(CASES) :] + list(CASES)[: turn % len(CASES)]
                for case in order:
                    run = measure_run(case, shards, directory / f"{turn}-{case}", arguments)
                    report.line("run", round=turn, **run)
                    runs[case].append(run)
    show(report, runs)


if __name__ == "__main__":
    main()
