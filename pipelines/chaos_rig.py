"""The processes of a chaos run: commands as a user would issue them, the Ray cluster and the MLflow server they use.

Every process is started in a session of its own, by which its descendants are found, also after their parent's death.
"""

import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Self

import psutil

from userrep.training.ledger import read_ledger

SHARED = "shared"  # the directory of the shared cluster
POLL_S = 0.02
DRAIN_LIMIT_S = 20
START_LIMIT_S = 120  # of a cluster or a server; assumption: a machine that needs longer cannot hold the run either


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Polls until the condition holds; False when it did not within the limit."""
    deadline = time.monotonic() + limit_s
    while not (holds := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return holds


class Session:
    """A process and everything that it starts."""

    def __init__(self, arguments: list[str], env: dict[str, str], log: Path, is_interactive: bool = False) -> None:
        """Starts Python.

        Args:
            arguments: for Python, e.g. `["-m", "pipelines.cli"]`.
            env: its whole environment.
            log: its output is appended to it.
            is_interactive: it is written to and read from; only its errors go to the log.
        """
        pipe = subprocess.PIPE if is_interactive else None
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                env=env,
                stdin=pipe or subprocess.DEVNULL,
                stdout=pipe or stream,
                stderr=stream,
                text=True,
                start_new_session=True,
            )

    @property
    def is_running(self) -> bool:
        """Whether the process itself, the first of the session, still runs."""
        return self.process.poll() is None

    def members(self) -> list[psutil.Process]:
        """All living processes of the session, oldest first."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == self.process.pid and is_alive(process):
                    found.append((process.create_time(), process.pid, process))
            except (ProcessLookupError, psutil.NoSuchProcess):
                continue
        return [process for _, _, process in sorted(found)]

    def train_workers(self) -> list[psutil.Process]:
        """Ray Train's workers among them."""
        return [process for process in self.members() if "RayTrainWorker" in _title(process)]

    def raylets(self) -> list[psutil.Process]:
        """Ray's node managers among them."""
        return [process for process in self.members() if _title(process).partition(" ")[0].endswith("/raylet")]

    def kill(self) -> None:
        """Kills everything in the session."""
        # What is alive may start another process while it is looked for.
        while members := self.members():
            for process in members:
                kill(process)
            psutil.wait_procs(members, timeout=1)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


class Rig:
    """Issues commands, on a cluster that outlives them or each on its own; use it as a context manager."""

    def __init__(self, workdir: Path, ray_dir: Path, num_nodes: int) -> None:
        """Args: ray_dir is for Ray's sockets, so its path is short; num_nodes is that of the shared cluster."""
        self._workdir, self._ray_dir, self._num_nodes = workdir, ray_dir, num_nodes
        self._token = secrets.token_hex(32)
        self._cluster: Session | None = None
        self._address = ""
        self._sessions: list[Session] = []

    def __enter__(self) -> Self:
        """Nothing is started before it is needed."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends every process."""
        for session in [*self._sessions, *([self._cluster] if self._cluster else [])]:
            session.kill()

    def cluster(self) -> Session:
        """The shared cluster; it is started when there is none, or none any more."""
        if self._cluster is None or not self._cluster.is_running or not self._cluster.raylets():
            if self._cluster is not None:
                self._cluster.kill()
            env = self._env(SHARED, "")
            arguments = ["-m", "pipelines.chaos_cluster", str(self._num_nodes)]
            self._cluster = Session(arguments, env, self._workdir / "cluster.log", is_interactive=True)
            self._address = self.ask_cluster()
            if not self._address:
                raise RuntimeError(f"no Ray cluster could be started; see {self._workdir / 'cluster.log'}")
        return self._cluster

    def ask_cluster(self, order: str = "") -> str:
        """Gives the cluster an order, and returns the next line that it says; empty when it has ended or is silent."""
        assert self._cluster is not None
        process = self._cluster.process
        assert process.stdin is not None
        assert process.stdout is not None
        if order:
            process.stdin.write(order + "\n")
            process.stdin.flush()
        # One line answers one order, so nothing waits in the buffer of the stream, where select would not see it.
        readable, _, _ = select.select([process.stdout], [], [], START_LIMIT_S)
        return process.stdout.readline().strip() if readable else ""

    def first_failure_ms(self, since_ms: int) -> int | None:
        """When Ray Train on the shared cluster first wrote of a failure after a time, both in unix ms; None: never."""
        logs = self._ray_dir / SHARED / "ray" / "session_latest" / "logs" / "train"
        times = [
            int(1000 * datetime.strptime(line["asctime"], "%Y-%m-%d %H:%M:%S,%f").timestamp())
            for path in logs.glob("ray-train-app-controller-*.log")
            for line in read_ledger(path)
            if "[FailurePolicy]" in line["message"]
        ]
        return min((time_ms for time_ms in times if time_ms >= since_ms), default=None)

    def issue(self, stage: str, job_dir: Path, tracking_uri: str, has_own_cluster: bool = False) -> Session:
        """Issues `userrep STAGE` for a job directory, which holds the job's `config.json`."""
        if not has_own_cluster:
            self.cluster()
        env = self._env(job_dir.name, "" if has_own_cluster else self._address) | {"MLFLOW_TRACKING_URI": tracking_uri}
        arguments = ["-m", "pipelines.cli", stage, "--config", str(job_dir / "config.json"), "--workdir", str(job_dir)]
        session = Session(arguments, env, job_dir / "command.log")
        self._sessions.append(session)
        return session

    def clear(self) -> None:
        """Ends what commands have left running, so that the next run has the machine for itself."""
        for session in self._sessions:
            # Metrics may still be on their way to MLflow; killed while it makes a database, the sender would spoil it.
            psutil.wait_procs(session.members(), timeout=DRAIN_LIMIT_S)
            session.kill()
        self._sessions.clear()
        if self._cluster is not None:
            for worker in self._cluster.train_workers():
                kill(worker)

    def _env(self, name: str, address: str) -> dict[str, str]:
        directory = self._ray_dir / name[:8]
        directory.mkdir(exist_ok=True)
        own = {
            "OMP_NUM_THREADS": "1",
            "RAY_TMPDIR": str(directory),  # a command without an address must find no cluster but its own
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_ADDRESS": address,
        }
        return {key: value for key, value in {**os.environ, **own}.items() if key != "RAY_ADDRESS" or value}


class MlflowServer:
    """An MLflow server over a database, to be killed."""

    def __init__(self, database_uri: str, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{port}"
        arguments = [
            "-m",
            "mlflow",
            "server",
            "--backend-store-uri",
            database_uri,
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        self._session = Session(arguments, dict(os.environ), log)
        if not wait_until(self._answers, START_LIMIT_S):
            self.kill()
            raise RuntimeError(f"no MLflow server could be started on port {port}; see {log}")

    def kill(self) -> None:
        """Kills it."""
        self._session.kill()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs or is stopped; one that is dead and only not reaped yet is not alive."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def kill(process: psutil.Process) -> None:
    """SIGKILL; a process that is gone already is fine."""
    send(process, signal.SIGKILL)


def send(process: psutil.Process, number: signal.Signals) -> None:
    """Sends a signal; a process that is gone already is fine."""
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def prepare_job(directory: Path, config_json: str, shards: Path | None) -> Path:
    """An empty job directory with its config, and a link to the shards that all runs share."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(config_json)
    if shards is not None:
        (directory / shards.name).symlink_to(shards)
    return directory


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
