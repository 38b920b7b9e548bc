"""Input of training: `python -m benchmarks.input_pipeline [--shards DIR] [--users N] [--json FILE]`.

Preparing windows in this process, by part; then the real training loop on two cores, two workers with one thread each
against one worker with two threads, alternating. Claims: two workers wait for input in at most 5% of the time, and get
through at least 0.9 times as many users per second as one worker. Without `--shards`, a table of the demo's synthetic
users is made first.
"""

import argparse
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pyarrow as pa
from rich.table import Table

from benchmarks.harness import MAX_OTHERS, Report
from pipelines import tokenize
from pipelines.console import Console
from pipelines.experiments.catalog import load_config
from pipelines.job import Job
from pipelines.run import run_stage
from pipelines.session import QUIET_ENV, WORKER_ENV
from userrep.data import stream
from userrep.data.augment import AugmentConfig
from userrep.data.views import ViewConfig, ViewKind
from userrep.models.clue import ClueConfig
from userrep.training.launch import train
from userrep.training.optim import OptimConfig
from userrep.training.settings import CluePretraining, WorkersConfig
from userrep.training.tracking import SPOOL_NAME, SpoolReader

CORES = 2
MAX_INPUT_WAIT = 0.05  # share of waiting in waiting and steps
MIN_TWO_WORKERS = 0.9  # users/s of two workers over those of one
MIN_BUSY_CORES = 1.6  # CPU seconds per second of a run; fewer, and its times say nothing
WARM_UP_STEPS = 2
PREPARED_BATCHES = 32  # at least two windows
PREPARE_ROUNDS = 3
SAMPLE_INTERVAL_S = 0.5
# The most work for the input and the least for the model: every view is thinned, and every token may be dropped.
HARD = AugmentConfig(cut="random", min_keep=0.3, max_events=12, token_drop=0.25)
AUGMENTS = {"thinned views": HARD, "whole views": AugmentConfig()}
PARTS = {
    "read": "read_row_group",
    "merge": "merge_row_groups",
    "list": "list_samples",
    "draw": "draw_events",
    "build": "build_batch",
    "to table": "to_table",
    "from table": "from_table",
}


@contextmanager
def two_cores() -> Iterator[None]:
    """A Ray cluster of two CPUs, which runs on two cores whatever the machine has."""
    for key, value in (WORKER_ENV | QUIET_ENV).items():
        os.environ.setdefault(key, value)
    import ray  # reads the environment

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[:CORES])
    ray.init(
        num_cpus=CORES,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        logging_level=logging.ERROR,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        os.sched_setaffinity(0, allowed)


def make_shards(users: int, directory: Path) -> Path:
    """Tokenized table of the demo's synthetic users."""
    job = Job(load_config("demo", None, [f"source.num_users={users}"]), directory, Console())
    with two_cores():
        for stage in ("ingest", "tokenize"):
            run_stage(job, stage)
    return job.path(tokenize.TABLE)


def prepare(shards: Path, kind: ViewKind, batch_size: int, augment: AugmentConfig) -> dict[str, float]:
    """CPU seconds per global batch of preparing windows for one worker in this process, by part and in `all`."""
    sets, views = stream.read_shard_sets([(shards, 1.0)]), ViewConfig(kinds=(kind,))
    batches = stream.open_stream(sets, views, augment, batch_size, seed=0, num_steps=PREPARED_BATCHES).batches()
    spent = dict.fromkeys(PARTS, 0.0)
    with ExitStack() as stack:
        for part, name in PARTS.items():
            stack.enter_context(mock.patch.object(stream, name, _timed(getattr(stream, name), spent, part)))
        started = time.process_time()
        num_batches = sum(1 for _ in batches)
        spent["all"] = time.process_time() - started
    return {part: seconds / num_batches for part, seconds in spent.items()}


def _timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        result = function(*args, **kwargs)
        spent[part] += time.process_time() - started
        return result

    return call


def show_preparation(report: Report, arguments: argparse.Namespace, shards: Path) -> None:
    """The fastest of the rounds for both kinds of augmentation."""
    pa.set_cpu_count(1)
    table = Table(title=f"preparing a global batch of {arguments.batch_size} users: CPU ms on one thread")
    for column in ("augmentation", *PARTS, "all"):
        table.add_column(column, justify="left" if column == "augmentation" else "right")
    for name, augment in AUGMENTS.items():
        started, cpu = time.perf_counter(), time.process_time()
        rounds = [prepare(shards, arguments.views, arguments.batch_size, augment) for _ in range(PREPARE_ROUNDS)]
        timing = {
            "wall_s": time.perf_counter() - started,
            "cpu_s": time.process_time() - cpu,
            "load": os.getloadavg()[0],
        }
        best = min(rounds, key=lambda parts: parts["all"])
        table.add_row(name, *(f"{1e3 * seconds:.2f}" for seconds in best.values()))
        report.line("preparation", augment=name, cpu_s_per_batch=best, **timing)
    report.console.print(table)


class CpuMonitor:
    """Samples the CPU seconds of this process and its descendants, and those of the whole machine."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, float, float]] = []  # unix time, CPU seconds of the tree, of the machine
        self._by_process: dict[tuple[int, float], float] = {}  # what an ended process used still counts
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "CpuMonitor":
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._stop.set()
        self._thread.join()

    def between(self, start: float, stop: float) -> tuple[float, float]:
        """CPU seconds of the tree and of the machine in a period of unix time."""
        times, tree, machine = np.array(self._samples).T
        tree_s, machine_s = (np.diff(np.interp([start, stop], times, values)) for values in (tree, machine))
        return float(tree_s[0]), float(machine_s[0])

    def _run(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            for process in [driver, *driver.children(recursive=True)]:
                try:
                    used = process.cpu_times()
                    self._by_process[process.pid, process.create_time()] = used.user + used.system
                except psutil.NoSuchProcess:
                    continue
            times = psutil.cpu_times()  # with what the host has taken
            machine = times.user + times.nice + times.system + times.irq + times.softirq + times.steal
            self._samples.append((time.time(), sum(self._by_process.values()), machine))


def measure_training(config: CluePretraining, shards: Path, run_dir: Path, num_workers: int) -> dict[str, Any]:
    """One run of the training loop; the steps after the warm-up count.

    Returns:
        `users_per_s` and `input_wait` as the first worker sees them, waiting included, validation left out. Of the
        period between the warm-up and the last step: `wall_s`, `cpu_s` of all processes of the run, `busy_cores` =
        cpu_s / wall_s, `others` = share of the two cores that other processes used.
    """
    run_dir.mkdir()
    with CpuMonitor() as monitor:
        train(shards, run_dir, config, WorkersConfig(num_workers=num_workers, threads=CORES // num_workers))
    points = SpoolReader(run_dir / SPOOL_NAME).read()
    steps = [point["metrics"] for point in points[WARM_UP_STEPS:]]
    wait_s, step_s = (sum(metrics[f"time/{name}"] for metrics in steps) for name in ("input_wait_s", "step_s"))
    # The point of the last step is written after its validation.
    start, stop = (points[place]["time_ms"] / 1e3 for place in (WARM_UP_STEPS - 1, -2))
    cpu_s, machine_s = monitor.between(start, stop)
    return {
        "workers": num_workers,
        "users_per_s": len(steps) * config.global_batch_size / (wait_s + step_s),
        "input_wait": wait_s / (wait_s + step_s),
        "step_s": [metrics["time/step_s"] for metrics in steps],
        "wall_s": stop - start,
        "cpu_s": cpu_s,
        "busy_cores": cpu_s / (stop - start),
        "others": max(0.0, machine_s - cpu_s) / (CORES * (stop - start)),
        "load": os.getloadavg()[0],
    }


def compare_workers(report: Report, arguments: argparse.Namespace, shards: Path, directory: Path) -> None:
    """Two workers with one thread against one with two, in alternating runs; both verdicts."""
    model = ClueConfig(
        dim=arguments.dim, item_layers=arguments.layers, service_layers=arguments.layers, num_heads=4, mlp_ratio=4
    )
    config = CluePretraining(
        model=model,
        views=ViewConfig(kinds=(arguments.views,)),
        augment=HARD,
        optim=OptimConfig(bag_steps=0),
        global_batch_size=arguments.batch_size,
        num_steps=arguments.steps,
        validate_every=arguments.steps,
        pool_size=64,
    )
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    table = Table(
        title=f"training, {arguments.batch_size} users, D={arguments.dim}, {arguments.layers}+{arguments.layers}"
    )
    for column in ("round", "workers", "users/s", "step s", "input wait", "wall s", "cpu/wall", "others", "load"):
        table.add_column(column, justify="right")
    with two_cores():
        for turn in range(arguments.rounds):
            for workers in (2, 1) if turn % 2 == 0 else (1, 2):
                run = measure_training(config, shards, directory / f"run-{turn}-{workers}", workers)
                runs[workers].append(run)
                report.line("training", round=turn, **run)
                table.add_row(
                    *(str(turn), f"{workers} x {CORES // workers}", f"{run['users_per_s']:,.1f}"),
                    *(f"{statistics.median(run['step_s']):.3f}", f"{run['input_wait']:.1%}", f"{run['wall_s']:.1f}"),
                    *(f"{run['busy_cores']:.2f}", f"{run['others']:.0%}", f"{run['load']:.1f}"),
                )
    report.console.print(table)
    waits = [run["input_wait"] for run in runs[2]]
    share, reason = statistics.median(waits), no_verdict(runs[2])
    report.verdict("share of time that two workers wait", share, MAX_INPUT_WAIT, "at most", reason, highest=max(waits))
    ratios = [two["users_per_s"] / one["users_per_s"] for one, two in zip(runs[1], runs[2], strict=True)]
    factor, reason = statistics.median(ratios), no_verdict(runs[2] + runs[1])
    claim = "users/s of two workers over one with two threads"
    report.verdict(claim, factor, MIN_TWO_WORKERS, "at least", reason, lowest=min(ratios), highest=max(ratios))


def no_verdict(runs: list[dict[str, Any]]) -> str | None:
    """Why times of these runs say nothing, or None."""
    others = max(run["others"] for run in runs)
    if others > MAX_OTHERS:
        return f"other processes used up to {others:.0%} of two cores"
    # One worker leaves a core idle wherever torch does not split its work: only of two is it known what they can use.
    busy_cores = min(run["busy_cores"] for run in runs if run["workers"] == 2)
    if busy_cores < MIN_BUSY_CORES:
        return f"two workers used {busy_cores:.2f} cores, a quiet machine gives {MIN_BUSY_CORES}"
    return None


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=Path, help="tokenized table of a job; default: synthetic users")
    parser.add_argument("--users", type=int, default=8_000, help="synthetic")
    parser.add_argument("--views", choices=("service", "time"), default="service")
    parser.add_argument("--batch-size", type=int, default=1_024, help="users of a global batch")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of each transformer")
    parser.add_argument("--steps", type=int, default=12, help=f"of a run, at least {WARM_UP_STEPS + 3}")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each kind; their order alternates")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP_STEPS + 3:
        parser.error(f"--steps {arguments.steps} leaves nothing to measure: take at least {WARM_UP_STEPS + 3}")
    return arguments


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    report = Report("input_pipeline", arguments.json, ("ray", "pyarrow"))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        shards = arguments.shards.resolve() if arguments.shards else make_shards(arguments.users, directory / "job")
        show_preparation(report, arguments, shards)
        compare_workers(report, arguments, shards, directory)


if __name__ == "__main__":
    main()
