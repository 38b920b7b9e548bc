"""Speed and driver memory of reading raw data: `python -m benchmarks.ingest [--json FILE] [--users N]`.

Claims: the synthetic source makes one million events in under 60 s; ingest is bounded in memory, so the driver's peak
is the same (within 20%) for N and for 10 N users. Every measurement runs in a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GENERATE = """
import json, resource, sys, time
from userrep.data.sources.synthetic import SyntheticSource
source = SyntheticSource(num_users=int(sys.argv[1]))
started, cpu = time.perf_counter(), time.process_time()
rows = sum(parsed.rows.num_rows for part in source.parts("events") for parsed in part())
print(json.dumps({"rows": rows, "wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu,
                  "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""

INGEST = """
import json, resource, sys, time
from pathlib import Path
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Job
from pipelines.run import run_stage
from userrep.data.sources.synthetic import SyntheticSource
job = Job(JobConfig(source=SyntheticSource(num_users=int(sys.argv[1]))), Path(sys.argv[2]), Console())
started = time.perf_counter()
run_stage(job, "ingest")
print(json.dumps({"rows": job.manifest("ingest").facts["rows"], "wall_s": time.perf_counter() - started,
                  "stage_s": job.reports[0].seconds,
                  "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))
"""


def measure(program: str, *arguments: str) -> dict[str, Any]:
    """Runs a program in a fresh interpreter and returns the JSON object that it prints last."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=21_000, help="synthetic users of the small run; 48 events each")
    parser.add_argument("--json", type=Path, help="append the results as JSON lines")
    arguments = parser.parse_args()
    results = [{"what": "generate", **measure(GENERATE, str(arguments.users))}]
    for users in (arguments.users, 10 * arguments.users):
        with tempfile.TemporaryDirectory() as directory:
            results.append({"what": f"ingest, {users:,} users", **measure(INGEST, str(users), directory)})
    for result in results:
        result["load_average_1m"] = os.getloadavg()[0]
        print(
            f"{result['what']:24} {result['rows']:>12,} events {result['wall_s']:8.1f} s "
            f"{result['peak_bytes'] / 2**20:8.0f} MiB peak of the driver, load {result['load_average_1m']:.1f}"
        )
    print(f"driver memory at 10x the data: {results[2]['peak_bytes'] / results[1]['peak_bytes']:.3f}x")
    if arguments.json:
        with arguments.json.open("a") as stream:
            stream.writelines(json.dumps(result) + "\n" for result in results)


if __name__ == "__main__":
    main()
