"""A real MLflow server in a process of its own, which can be killed and started again at the same address."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Self

LIMIT_S = 180  # a server starts in 5 s, on a machine that has nothing else to do


class MlflowServer:
    def __init__(self, root: Path, artifacts: str = "") -> None:
        """Args: root holds its database and its log, and its files unless artifacts is a URI for them."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.root, self.artifacts = root, artifacts or str(root / "files")
        self.uri = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Returns when it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.root / 'mlflow.db'}"]
        command += ["--artifacts-destination", self.artifacts]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self.root / "log").open("ab") as log:
            # A group of its own: the server starts processes, which die with it.
            self._process = subprocess.Popen(
                command, cwd=self.root, env=environment, stdout=log, stderr=log, process_group=0
            )
        wait_until(lambda: self._answers() or self._process.poll() is not None)
        assert self._process.poll() is None, (self.root / "log").read_text()

    def kill(self) -> None:
        """SIGKILL, of everything that belongs to it."""
        if self._process.returncode is None:
            self.send(signal.SIGKILL)
            self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """SIGSTOP makes a server that takes requests and never answers, until SIGCONT."""
        os.killpg(self._process.pid, number)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False


def wait_until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s in vain"
        time.sleep(0.1)
