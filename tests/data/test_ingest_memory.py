"""The driver of ingest holds counts, not data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.shared_data import ROOT

# ru_maxrss is the peak so far, of this process alone: Ray's own processes and workers are not in it.
MEASURED = """
import json, resource, sys
import pipelines.cli, pipelines.run, ray.data, torch
imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = 0
try:
    pipelines.cli.main()
except SystemExit as stop:
    status = stop.code or 0
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"imported_mib": imported / 1024, "peak_mib": peak / 1024}))
sys.exit(status)
"""


def driver_memory(workdir: Path, num_users: int) -> dict[str, float]:
    command = [sys.executable, "-c", MEASURED, "ingest", "--config", "smoke", "--workdir", str(workdir)]
    run = subprocess.run(
        [*command, "--set", f"source.num_users={num_users}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    manifest = json.loads((workdir / "ingest" / "manifest.json").read_text())
    assert manifest["facts"]["users"] == num_users
    return {"events": manifest["facts"]["rows"], **json.loads(run.stdout.splitlines()[-1])}


@pytest.mark.slow
@pytest.mark.ray
def test_the_drivers_memory_does_not_grow_with_the_data(tmp_path: Path):
    small, large = (driver_memory(tmp_path / str(users), users) for users in (20_000, 200_000))
    print(json.dumps({"20k users": small, "200k users": large}))
    assert large["events"] > 9 * small["events"]
    assert 0.8 <= large["peak_mib"] / small["peak_mib"] <= 1.2
    # Beyond the libraries, the run itself took 47 MiB and 52 MiB when this was written.
    assert large["peak_mib"] - large["imported_mib"] <= 1.2 * (small["peak_mib"] - small["imported_mib"]) + 10
