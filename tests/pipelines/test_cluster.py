"""Clusters of several nodes on this machine: a node dies while its worker trains, and the commands of the document."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipelines.chaos import LEDGER, chaos_config, run_chaos
from pipelines.chaos_rig import Session, wait_until
from pipelines.chaos_schedule import kinds_for, make_schedule
from pipelines.chaos_storage import can_lock_storage
from tests.pipelines.test_submit_cluster import BUSY, START_LIMIT_S, free_ports, is_open

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DOCUMENT = Path(__file__).parents[2] / "cluster" / "README.md"
JOB_LIMIT_S = 1800


def test_one_of_two_nodes_dies_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    steps = chaos_config().pretrain.num_steps, chaos_config().pretrain.validate_every
    kinds = kinds_for(3, can_lock_storage(tmp_path))
    seed = next(seed for seed in range(1000) if make_schedule(1, seed, kinds, *steps, num_nodes=3)[0].kind == "node")
    workdir = tmp_path / "chaos"
    assert run_chaos(1, seed, workdir, nodes=3) == 0
    undisturbed, run, last = map(json.loads, (workdir / LEDGER).read_text().splitlines())
    assert "one of 2 that train" in run["strike"]["what"]
    assert len(run["starts"]) == 2
    assert run["hashes"] == undisturbed["hashes"]
    assert last["verdict"] == "pass"


def commands() -> list[str]:
    section = DOCUMENT.read_text().partition("## Three nodes on one machine")[2]
    found = re.search(r"```\n(.*?)```", section, flags=re.DOTALL)
    assert found
    return [line.split("#")[0].strip() for line in found[1].splitlines()]


def test_the_main_job_runs_on_three_nodes_as_documented(tmp_path: Path) -> None:
    gcs, dashboard = free_ports(2)
    home, shared = tmp_path / "home", tmp_path / "shared"
    home.mkdir()
    replaced = {"6379": str(gcs), "8265": str(dashboard), "/mnt/userrep": str(shared), "~/": f"{home}/"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    with ExitStack() as stack:
        ray_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True))
        env = kept | {"HOME": str(home), "PATH": path, "RAY_TMPDIR": ray_dir} | BUSY
        nodes = []
        for line in commands():
            for old, new in replaced.items():
                line = line.replace(old, new)
            words = shlex.split(line)
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                env[name] = value
            elif words[:2] == ["ray", "start"]:
                ports = [f"--dashboard-agent-listen-port={free_ports(1)[0]}", f"--object-store-memory={200 << 20}"]
                if "--head" in words:
                    ports.append(f"--ray-client-server-port={free_ports(1)[0]}")
                arguments = ["-m", "ray.scripts.scripts", *words[1:], "--block", *ports]
                nodes.append(Session(arguments, env, tmp_path / f"node{len(nodes)}.log"))
                stack.callback(nodes[-1].kill)
                started = tmp_path / f"node{len(nodes) - 1}.log"
                assert wait_until(lambda log=started: "Ray runtime started" in log.read_text(), START_LIMIT_S)
            else:
                line = (
                    line.replace("userrep ", f"{sys.executable} -m pipelines.cli ", 1)
                    if words[0] == "userrep"
                    else line
                )
                subprocess.run(["sh", "-c", line], env=env, check=True, timeout=JOB_LIMIT_S)
        assert len(nodes) == 3
        assert all(node.is_running for node in nodes)
        assert is_open(dashboard)
    summary = json.loads((shared / "smoke" / "summary.json").read_text())
    assert summary["pull"]["verified"] is True
