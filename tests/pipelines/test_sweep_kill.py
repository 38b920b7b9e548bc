"""Sweeps that are killed, and cells as Ray jobs. Heavy: every start of a sweep takes a minute."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pipelines.sweep_cell import read_row
from pipelines.sweep_queue import JOURNAL_NAME
from pipelines.sweep_status import read_status

pytestmark = pytest.mark.slow

SETTINGS = ("--set", "lanes.checkpoint_s=1", "--flops-per-s", "1e10")
KILLS = 3
# Six cells that take some ten seconds each.
GRID = (
    "grids=[{design: star, center: {parameters: 2.0e+4, samples: 16384, max_events: 8, batch_size: 64}, "
    "parameters: [1.0e+4, 4.0e+4], samples: [8192, 32768], batch_sizes: [128], users: all}]"
)


def start(workdir: Path, *more: str, **env: str) -> subprocess.Popen[bytes]:
    """`userrep sweep run` in a process group of its own, so that everything it starts can be killed with it."""
    command = [sys.executable, "-m", "pipelines.cli", "sweep", "run", "--config", "sweep_smoke"]
    words = [*command, "--workdir", str(workdir), *SETTINGS, *more]
    with (workdir.parent / f"{workdir.name}.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, env=os.environ | env)


def journal(workdir: Path) -> list[dict[str, Any]]:
    path = workdir / "sweep" / JOURNAL_NAME
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for_events(process: subprocess.Popen[bytes], workdir: Path, number: int) -> None:
    """Returns when the journal has so many lines, of units that were taken and cells that were finished."""
    deadline = time.monotonic() + 240
    while len(journal(workdir)) < number:
        assert process.poll() is None, "meant to be killed at work"
        assert time.monotonic() < deadline, "nothing has happened in four minutes"
        time.sleep(0.02)


def wait_for_port(port: int) -> None:
    """Returns when something listens on a port of this machine."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError(f"nothing listens on port {port} after two minutes")


def test_a_sweep_that_is_killed_three_times_finishes_every_cell_once(tmp_path: Path):
    workdir, luck = tmp_path / "sweep", random.Random(7)
    rows: dict[str, dict[str, Any]] = {}
    for _ in range(KILLS):
        num_before = len(journal(workdir))
        process = start(workdir, "--set", GRID, "--set", "lanes.num_lanes=1")
        wait_for_events(process, workdir, num_before + luck.randint(2, 3))
        time.sleep(luck.uniform(0, 1))
        assert process.poll() is None, "meant to be killed at work"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for row in read_status(workdir)[0]:
            if row["status"] == "finished":
                rows.setdefault(row["cell_id"], row)
    assert start(workdir, "--set", GRID).wait(600) == 0, (tmp_path / "sweep.log").read_text()[-2000:]
    table, _ = read_status(workdir)
    assert Counter(row["status"] for row in table) == {"finished": 6}
    for row in table:
        # What was finished before a kill is what there is now, to the second at which it was committed.
        assert rows.get(row["cell_id"], row) == row
        claims = [
            line["time_s"]
            for line in journal(workdir)
            if line["event"] == "start" and row["cell_id"] in line.get("cell_ids", ())
        ]
        assert claims, "it was run"
        assert max(claims) <= row["finished_at"].timestamp() + 1, "it was never begun again once it was finished"


def test_every_cell_is_a_job_of_its_own(tmp_path: Path):
    workdir = tmp_path / "sweep"
    env = {"RAY_AUTH_MODE": "disabled"}
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    head = [*ray, "start", "--head", "--block", "--num-cpus=2", "--dashboard-port=28265", "--port=26379"]
    cluster = subprocess.Popen(head, start_new_session=True, env=os.environ | env)
    try:
        address = "http://127.0.0.1:28265"
        wait_for_port(28265)
        process = start(workdir, "--jobs-address", address, "--job-python", sys.executable, **env)
        assert process.wait(600) == 0, (tmp_path / "sweep.log").read_text()[-2000:]
        table, _ = read_status(workdir)
        assert Counter(row["status"] for row in table) == {"finished": 6}
        listed = subprocess.run(
            [*ray, "job", "list", "--address", address], check=True, env=os.environ | env, capture_output=True
        )
        for row in table:
            assert f"submission_id='{row['cell_id']}'" in listed.stdout.decode() + listed.stderr.decode()
        # The same command has nothing to do; a job that has ended without a result is submitted again.
        lost = workdir / "sweep" / "cells" / table[0]["cell_id"] / "result"
        before = read_row(lost.parent)
        lost.rename(tmp_path / "lost")
        again = start(workdir, "--jobs-address", address, "--job-python", sys.executable, **env)
        assert again.wait(600) == 0, (tmp_path / "sweep.log").read_text()[-2000:]
        after = read_row(lost.parent)
        assert after is not None
        assert before is not None
        assert after["loss"] == before["loss"]
    finally:  # not `ray stop`, which ends every cluster of this machine
        os.killpg(cluster.pid, signal.SIGTERM)
        cluster.wait(60)
