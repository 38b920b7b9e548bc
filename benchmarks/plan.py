"""Restoring the position in a run, and how well it is shuffled: `python -m benchmarks.plan [--json FILE]`.

Restore: a process of its own reads the manifest of a simulated table (there is no data behind it), builds the stream of
a run of ten epochs and orders the samples of the window in which the last epoch is half over. Claims: at most 2 s and
500 MB for 100 million rows; the stream holds at most 64 bytes for a row group, whatever the number of rows.

Shuffle: in how far a plan that reads row groups one after another differs from a full shuffle, where users meet in a
batch with the same probability in every epoch. Users of one row group come into the same window in each epoch, so they
meet more often; row groups hold users by the hash of their ids, so these are strangers like any other, and what is lost
is that a part of a batch was met before. Claim: at most 1% of a batch more than after a full shuffle.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from benchmarks.harness import Report
from userrep.data.plan import Plan
from userrep.manifest import Manifest, write_manifest

EPOCHS_OF_A_RUN = 10
ROW_GROUPS_PER_SHARD = 1_000
MAX_RESTORE_S, MAX_RESTORE_MB, MAX_BYTES_PER_ROW_GROUP = 2.0, 500.0, 64.0
MAX_RETURNING = 0.01  # of a batch
RESTORE = """
import gc, json, sys, time, tracemalloc
from pathlib import Path
from userrep.data import plan
from userrep.data.augment import AugmentConfig
from userrep.data.stream import ShardSet, open_stream
from userrep.data.views import ViewConfig
from userrep.manifest import read_manifest

directory, batch_size, num_steps, start_step = Path(sys.argv[1]), *map(int, sys.argv[2:])

def status_bytes(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024

def restore(shards):
    stream = open_stream([ShardSet(directory, shards)], ViewConfig(), AugmentConfig(), batch_size, 0, num_steps)
    stream.plan.samples(stream.plan.windows(start_step)[0])
    return stream

imported_bytes, started, cpu = status_bytes("VmRSS"), time.perf_counter(), time.process_time()
shards = read_manifest(directory).facts["shards"]
read_s = time.perf_counter() - started
restore(shards)
measured = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu, "read_manifest_s": read_s,
            "peak_bytes": status_bytes("VmHWM"), "imported_bytes": imported_bytes}
plan._row_group_order.cache_clear()
gc.collect()
tracemalloc.start()
stream = restore(shards)
gc.collect()
print(json.dumps({**measured, "held_bytes": tracemalloc.get_traced_memory()[0]}))
"""


class Simulated(NamedTuple):
    """A table without data."""

    num_row_groups: int
    samples_per_row_group: int

    @property
    def num_samples(self) -> int:
        return self.num_row_groups * self.samples_per_row_group

    def write(self, directory: Path) -> None:
        """Writes a manifest of as many facts as those of real tables."""
        size = self.samples_per_row_group
        counts = {split: dict.fromkeys(("service", "time", "mixed"), size) for split in ("train", "validation", "test")}
        row_group = {"rows": size, "items": size, "samples": counts}
        shards = [
            {"shard": shard, "users": size * ROW_GROUPS_PER_SHARD, "row_groups": [row_group] * ROW_GROUPS_PER_SHARD}
            for shard in range(self.num_row_groups // ROW_GROUPS_PER_SHARD)
        ]
        write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts={"shards": shards}))


def measure_restore(table: Simulated, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """What the process of each round measured."""
    num_steps = EPOCHS_OF_A_RUN * table.num_samples // batch_size
    start_step = num_steps - table.num_samples // batch_size // 2
    arguments = [str(number) for number in (batch_size, num_steps, start_step)]
    with tempfile.TemporaryDirectory() as directory:
        table.write(Path(directory))
        command = [sys.executable, "-c", RESTORE, directory, *arguments]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(rounds)]
    return [json.loads(run.stdout) for run in runs]


def show_restore(report: Report, tables: list[tuple[Simulated, int]], rounds: int) -> None:
    """Time and memory of a restore."""
    shown = Table(
        "rows", "row groups", "global batch", "wall s", "of it manifest", "CPU s", "peak MB", "of it imports", "bytes"
    )
    shown.title, shown.caption = f"restore, median of {rounds}", "bytes: held by the stream for each row group"
    results = []
    for table, batch_size in tables:
        runs = measure_restore(table, batch_size, rounds)
        result = {name: median(run[name] for run in runs) for name in runs[0]}
        results.append(result)
        numbers = [table.num_samples, table.num_row_groups, batch_size]
        measured = [result[name] for name in ("wall_s", "read_manifest_s", "cpu_s")]
        measured += [result[name] / 1e6 for name in ("peak_bytes", "imported_bytes")]
        measured.append(result["held_bytes"] / table.num_row_groups)
        shown.add_row(*(f"{number:,}" for number in numbers), *(f"{value:,.2f}" for value in measured))
        report.line("restore", **table._asdict(), batch_size=batch_size, runs=runs)
    report.console.print(shown)
    worst = {name: max(result[name] for result in results) for name in results[0]}
    held = max(r["held_bytes"] / table.num_row_groups for r, (table, _) in zip(results, tables, strict=True))
    report.verdict("seconds of a restore", worst["wall_s"], MAX_RESTORE_S, "at most")
    report.verdict("MB of a process that restores", worst["peak_bytes"] / 1e6, MAX_RESTORE_MB, "at most")
    report.verdict("bytes for a row group", held, MAX_BYTES_PER_ROW_GROUP, "at most")


def batches_of_epoch(plan: Plan, epoch: int) -> np.ndarray:
    """Step that each sample of a plan over one source is taken in, samples in manifest order, int64 (N,)."""
    (counts,), (size,) = plan.counts, plan.num_samples
    first_samples = np.cumsum(counts) - counts
    found = np.full(size, -1)
    per_window = plan.window_steps * plan.global_batch_size
    for window in range(epoch * size // per_window, -(-(epoch + 1) * size // per_window)):
        row_groups, numbers = plan.samples(window)
        places = window * per_window + np.arange(per_window)
        mine = (places >= epoch * size) & (places < (epoch + 1) * size)
        found[(first_samples[row_groups] + numbers)[mine]] = places[mine] // plan.global_batch_size
    return found


def pairs(labels: np.ndarray) -> int:
    """Number of pairs with equal labels."""
    sizes = np.unique(labels, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())


def meeting_rate(batches: np.ndarray, row_groups: np.ndarray) -> float:
    """Share of the pairs of one row group that are in the same batch."""
    return pairs(row_groups * (batches.max() + 1) + batches) / pairs(row_groups)


def returning_share(one: np.ndarray, other: np.ndarray, batch_size: int) -> float:
    """Share of the others in a batch of one epoch that were in the user's batch of another epoch as well."""
    return 2 * pairs((one - one.min()) * (other.max() + 1) + other) / (len(one) * (batch_size - 1))


def expected_rates(num_row_groups: int, row_group_size: int, batch_size: int, window_steps: int) -> tuple[float, float]:
    """What `meeting_rate` and `returning_share` are on average, where an epoch consists of whole windows.

    A row group lies at every place of the epoch with the same probability. Those of its pairs that fall into one window
    meet with probability (B - 1) / (window - 1), others never. All pairs of different row groups are alike, and every
    user has B - 1 others in a batch; so these meet with the probability that is left. Epochs are independent.
    """
    window, size = window_steps * batch_size, num_row_groups * row_group_size
    starts = np.arange(num_row_groups) * row_group_size
    same_window = mean(pairs(np.arange(start, start + row_group_size) // window) for start in starts)
    near = same_window / (row_group_size * (row_group_size - 1) / 2) * (batch_size - 1) / (window - 1)
    far = (batch_size - 1 - (row_group_size - 1) * near) / (size - row_group_size)
    returning = (row_group_size - 1) * near**2 + (size - row_group_size) * far**2
    return near, returning / (batch_size - 1)


class Rates(NamedTuple):
    """Of every epoch, and of every pair of epochs."""

    meeting: list[float]
    returning: list[float]


def measure_rates(epochs: list[np.ndarray], row_groups: np.ndarray, batch_size: int) -> Rates:
    """Statistics of the batches that samples are in, one array for each epoch."""
    meeting = [meeting_rate(epoch, row_groups) for epoch in epochs]
    returning = [returning_share(one, other, batch_size) for one, other in itertools.combinations(epochs, 2)]
    return Rates(meeting, returning)


def show_shuffle(report: Report, cases: list[tuple[Simulated, int]], num_epochs: int) -> None:
    """Both statistics of the plan and of a full shuffle, and their deviation over epochs."""
    shown = Table("row groups", "samples in each", "global batch", "order", "same row group meets", "returning share")
    shown.title = f"shuffle, {num_epochs} epochs: mean and standard deviation"
    claims: dict[str, float] = {}
    for table, batch_size in cases:
        counts = np.full(table.num_row_groups, table.samples_per_row_group)
        plan = Plan((counts,), (1.0,), batch_size, seed=0, num_steps=0)
        row_groups = np.repeat(np.arange(len(counts)), counts)
        rng = np.random.default_rng(0)
        orders = {
            "plan": [batches_of_epoch(plan, epoch) for epoch in range(num_epochs)],
            "full shuffle": [rng.permutation(table.num_samples) // batch_size for _ in range(num_epochs)],
        }
        rates = {name: measure_rates(epochs, row_groups, batch_size) for name, epochs in orders.items()}
        expected = {
            "plan": expected_rates(*table, batch_size, plan.window_steps),
            "full shuffle": ((batch_size - 1) / (table.num_samples - 1),) * 2,
        }
        for name, rate in rates.items():
            cells = [
                f"{mean(values):.3e} +- {stdev(values):.0e}, expected {value:.3e}"
                for values, value in zip(rate, expected[name], strict=True)
            ]
            shown.add_row(*(f"{number:,}" for number in (*table, batch_size)), name, *cells)
            facts = {**table._asdict(), "batch_size": batch_size, "window_steps": plan.window_steps}
            report.line("shuffle", order=name, **facts, **rate._asdict(), expected=expected[name])
        case = f"{table.samples_per_row_group:,} in a row group, batch {batch_size:,}"
        claims[f"returning share beyond a full shuffle, {case}"] = mean(rates["plan"].returning) - mean(
            rates["full shuffle"].returning
        )
    report.console.print(shown)
    for claim, measured in claims.items():
        report.verdict(claim, measured, MAX_RETURNING, "at most")


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes that restore, for each table")
    parser.add_argument("--row-groups", type=int, default=100_000, help="of the simulated table, a multiple of 1,000")
    parser.add_argument("--epochs", type=int, default=8, help="of which the shuffle is measured")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    report = Report("plan", arguments.json)
    large, few_rows = Simulated(arguments.row_groups, 1_000), Simulated(arguments.row_groups, 10)
    show_restore(report, [(large, 8_192), (large, 512), (few_rows, 512)], arguments.rounds)
    cases = [(Simulated(1_024, 1_024), 512), (Simulated(1_024, 1_024), 8_192), (Simulated(64, 16_384), 512)]
    show_shuffle(report, cases, arguments.epochs)


if __name__ == "__main__":
    main()
