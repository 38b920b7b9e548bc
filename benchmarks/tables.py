"""Speed and memory of embedding tables: `python -m benchmarks.tables [--rows N] [--dim D] [--json FILE]`.

Claims, at 1,000,000 x 128 float32: a publish, hashing included, gets through at least 100 MB/s; 10,000 users are read
by id in at most 1 s; a full scan gives at least 300 MB/s; two versions are compared in at most 10 s; none of them takes
more than 1 GB of memory. Every measurement runs in a process of its own, whose peak is that of all of it, imports
included. The MLflow database exists before; making it takes seconds, once. A bar that is missed on a busy machine says
nothing; one that is held there is held.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import MAX_OTHERS, Report

BUCKETS = 16
MB = 1e6
WORK = """
import json, sys, time
from pathlib import Path
folder, rows, dim = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
uri = f"sqlite:///{{folder / 'mlflow.db'}}"
{setup}
started, cpu = time.perf_counter(), time.process_time()
{work}
wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
# ru_maxrss would hold the parent's peak too.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps({{"wall_s": wall_s, "cpu_s": cpu_s, "peak_mb": int(peak.split()[1]) * 1.024 / 1e3,
                  "result": str(result)}}))
"""
BUILD = """
import zlib
import numpy as np, pyarrow as pa
from userrep.publishing.table import finish_table, write_part
from userrep.schema import user_embeddings
ids = np.array([f"user-{number:09d}" for number in range(rows)])
bucket_N = np.array([zlib.crc32(one.encode()) for one in ids.tolist()]) % BUCKETS
facts = {"encoder_digest": "e", "tokenizer_digest": "t", "data_digest": "d", "code_version": "c"}
schema = user_embeddings(dim, "float32")
turn_DD = np.linalg.qr(np.random.default_rng(0).standard_normal((dim, dim)))[0].astype(np.float32)
def build(directory, is_second):
    directory = directory.resolve()
    directory.mkdir(parents=True)
    parts = []
    for bucket in range(BUCKETS):
        draw, mine = np.random.default_rng(bucket), np.flatnonzero(bucket_N == bucket)
        vectors = draw.standard_normal((len(mine), dim), dtype=np.float32)
        if is_second:  # another training: other axes, some noise, 1% of the users gone
            vectors = vectors @ turn_DD + 0.3 * draw.standard_normal(vectors.shape, dtype=np.float32)
            kept = draw.random(len(mine)) > 0.01
            vectors, mine = vectors[kept], mine[kept]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), dim)
        columns = [pa.array(ids[mine]), column, pa.array(np.ones(len(mine), np.int32)), pa.nulls(len(mine), pa.int64())]
        parts.append(write_part(directory, bucket, pa.Table.from_arrays(columns, schema=schema)))
    finish_table(directory, parts=parts, dim=dim, dtype="float32", facts=facts, config={}, inputs={})
"""
WRITE = "write both"
STEPS = {
    WRITE: (BUILD, "build(folder / 'v1', False); build(folder / 'v2', True); result = 2"),
    "publish": (
        "from userrep.publishing.connection import connect\nfrom userrep.publishing.registry import publish\n"
        "with connect(uri, create=True) as client:\n    client.search_experiments()",
        "result = publish(folder / 'v1', 'users', 'champion', tracking_uri=uri, experiment='t')",
    ),
    "read 10,000 by id": (
        "import random\nfrom userrep.publishing.table import lookup, read_table\n"
        "ids = [f'user-{number:09d}' for number in random.Random(1).sample(range(rows), min(rows, 10_000))]",
        "result = lookup(read_table(folder / 'v1', verify=False), ids).num_rows",
    ),
    "full scan": (
        "from userrep.publishing.table import read_table",
        "result = sum(batch.num_rows for batch in read_table(folder / 'v1', verify=False).to_batches())",
    ),
    "diff": (
        "from userrep.publishing.diff import diff_tables",
        "result = diff_tables(folder / 'v1', folder / 'v2')",
    ),
    "release": (
        "from userrep.publishing.release import release",
        "result = release(folder / 'v2', 'users', 'champion', tracking_uri=uri, experiment='t').report.drift",
    ),
    "pull aligned": (
        "from userrep.publishing.client import pull",
        "result = pull('users@v2', folder / 'copy', tracking_uri=uri, aligned_to='v1').manifest.facts['aligned']",
    ),
}


def measure(name: str, folder: Path, rows: int, dim: int) -> dict[str, Any]:
    """Runs a step in a fresh interpreter; adds which share of the machine others used meanwhile."""
    setup, work = (text.replace("BUCKETS", str(BUCKETS)) for text in STEPS[name])
    program = WORK.format(setup=setup, work=work)
    machine, own, started = _machine_s(), _children_s(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(rows), str(dim)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    others_s = _machine_s() - machine - (_children_s() - own)
    share = others_s / ((time.perf_counter() - started) * (os.cpu_count() or 1))
    return {**found, "others": max(0.0, share), "load_average_1m": os.getloadavg()[0]}


def main() -> None:
    """Runs all steps and judges the claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000, help="users")
    parser.add_argument("--dim", type=int, default=128, help="of their vectors")
    parser.add_argument("--folder", type=Path, help="tables that are there are taken, others made and kept there")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="what is run, in this order")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    report = Report("tables", arguments.json, ("pyarrow", "mlflow-skinny"))
    megabytes = arguments.rows * arguments.dim * 4 / MB
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        for table in ("v1", "v2") if arguments.folder else ():
            (folder / table).symlink_to(arguments.folder.resolve() / table)
        is_there = (folder / "v2" / "manifest.json").is_file()
        steps = [name for name in arguments.steps if not (is_there and name == WRITE)]
        found = {name: measure(name, folder, arguments.rows, arguments.dim) for name in steps}
    for name, one in found.items():
        tables = 2 if name == WRITE else 1
        rate = tables * megabytes / one["wall_s"]
        report.console.print(
            f"{name:18} {one['wall_s']:7.2f} s {one['cpu_s']:7.2f} CPU s {rate:7.0f} MB/s {one['peak_mb']:6.0f} MB, "
            f"others {one['others']:.0%}: {one['result'][:300]}"
        )
        report.line("step", step=name, rows=arguments.rows, dim=arguments.dim, megabytes=megabytes, **one)
    _judge(report, found, megabytes)


def _judge(report: Report, found: dict[str, dict[str, Any]], megabytes: float) -> None:
    bars = {
        "publish": ("publish, MB/s", 100, "at least"),
        "read 10,000 by id": ("10,000 users by id, s", 1, "at most"),
        "full scan": ("full scan, MB/s", 300, "at least"),
        "diff": ("two versions compared, s", 10, "at most"),
    }
    judged = [
        (claim, name, megabytes / found[name]["wall_s"] if side == "at least" else found[name]["wall_s"], bar, side)
        for name, (claim, bar, side) in bars.items()
        if name in found
    ]
    judged += [
        (f"memory of {name}, MB", name, found[name]["peak_mb"], 1000, "at most") for name in found if name != WRITE
    ]
    for claim, name, measured, bar, side in judged:
        is_held = measured >= bar if side == "at least" else measured <= bar
        is_busy = found[name]["others"] > MAX_OTHERS and "memory" not in claim and not is_held
        reason = f"other processes used {found[name]['others']:.0%} of the machine" if is_busy else None
        report.verdict(claim, measured, bar, side, reason)


def _machine_s() -> float:
    times = psutil.cpu_times()
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
