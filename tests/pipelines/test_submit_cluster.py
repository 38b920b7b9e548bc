"""`userrep submit` on a real cluster that asks for a token: the job runs, twice is once, and the token is nowhere."""

import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.chaos_rig import Session, wait_until
from pipelines.cli import app
from pipelines.console import Console
from pipelines.experiments.catalog import load_config
from pipelines.job_server import connect
from userrep.config import ConfigError
from userrep.manifest import read_manifest

pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning"),  # aiohttp 3.14 of Ray 2.60
]

START_LIMIT_S = 300
# By default Ray gives way to everything else on the machine.
BUSY = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
CONFIG = load_config(
    "smoke",
    None,
    [
        *("source.num_users=300", "source.num_items=200", "ingest.num_shards=2", "tokenize.vocab_size=512"),
        *(
            "pretrain.num_steps=4",
            "pretrain.validate_every=2",
            "pretrain.global_batch_size=32",
            "pretrain.pool_size=20",
        ),
        *("pretrain.optim.bag_steps=2", "teach.questions=[]", "evaluate.pool_size=20"),
        *("evaluate.bag_of_tokens_steps=2", "evaluate.without_blocks=false"),
    ],
)


@dataclass(frozen=True)
class TokenCluster:
    address: str
    token: str
    home: Path
    ray_dir: Path


def free_ports(number: int) -> list[int]:
    probes = [socket.socket() for _ in range(number)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenCluster]:
    home = tmp_path_factory.mktemp("home")
    file, token = home / ".ray" / "auth_token", secrets.token_hex(32)
    file.parent.mkdir()
    file.write_text(token)
    file.chmod(0o600)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    dashboard, gcs, client, agent = free_ports(4)
    # Ray's sockets lie in its directory, and the name of a socket is short.
    with tempfile.TemporaryDirectory(prefix="rs-", ignore_cleanup_errors=True) as ray_dir:
        own = {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_TMPDIR": ray_dir} | BUSY
        arguments = [
            *("start", "--head", "--block", "--num-cpus=2", f"--port={gcs}", "--dashboard-host=127.0.0.1"),
            *(f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", "--disable-usage-stats"),
            *(f"--dashboard-agent-listen-port={agent}", f"--object-store-memory={200 << 20}"),
        ]
        log = home / "start.log"
        session = Session(["-m", "ray.scripts.scripts", *arguments], kept | own, log)
        try:
            wait_until(lambda: not session.is_running or is_open(dashboard), START_LIMIT_S)
            assert session.is_running, log.read_text()
            yield TokenCluster(f"http://127.0.0.1:{dashboard}", token, home, Path(ray_dir))
        finally:
            session.kill()


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def files_that_hold(text: str, *directories: Path) -> list[Path]:
    files = [path for directory in directories for path in directory.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if text.encode() in path.read_bytes()]


@pytest.mark.parametrize("stage", ["ingest", pytest.param("run", marks=pytest.mark.slow)])
def test_a_job_runs_once_and_the_token_is_nowhere(
    stage: str, cluster: TokenCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(cluster.home))
    monkeypatch.setenv("A_VARIABLE", "its value")
    config, workdir = tmp_path / "mine.json", tmp_path / "work"
    config.write_text(CONFIG.model_dump_json())

    words = ["submit", stage, "--config", str(config), "--workdir", str(workdir), "--address", cluster.address]
    words += ["--python", sys.executable, "--env", "A_VARIABLE"]

    with monkeypatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        refused = invoke(*words)
        assert isinstance(refused.exception, ConfigError)
        assert "asks for a token and got none" in str(refused.exception)
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)
        refused = invoke(*words)
        assert isinstance(refused.exception, ConfigError)
        assert "refuses this token" in str(refused.exception)

    first = invoke(*words, "--follow")
    assert first.exit_code == 0, first.output[-5000:]
    assert "ingest: started" in first.output
    assert read_manifest(workdir / "ingest").facts["users"] == 300
    assert (workdir / "report.html").is_file() is (stage == "run")
    again = invoke(*words, "--wait")
    assert again.exit_code == 0
    assert "has succeeded already" in again.output

    failed = invoke(*words, "--follow", "--data", "/absent")
    assert failed.exit_code == 1
    assert "generates its data" in failed.output

    jobs = connect(cluster.address, Console()).jobs()
    listed = invoke("jobs", "list", "--address", cluster.address)
    assert [line.split()[1] for line in listed.stdout.splitlines()][-2:] == ["SUCCEEDED", "FAILED"]
    told = "".join(job.model_dump_json() for job in jobs.values())
    assert "its value" in told  # so that it is where the token is looked for
    for text in (told, listed.output, first.output, again.output, failed.output):
        assert cluster.token not in text
    assert files_that_hold(cluster.token, cluster.ray_dir, tmp_path) == []
    assert files_that_hold(cluster.token, cluster.home) == [cluster.home / ".ray" / "auth_token"]
    assert files_that_hold(f"pipelines.cli {stage}", cluster.ray_dir)  # the search finds what is there
