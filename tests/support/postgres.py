"""A PostgreSQL of the distribution's package, in a directory of its own, as a user that is not root."""

import os
import pwd
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import Self

import pytest

PACKAGES = Path("/usr/lib/postgresql")


class Postgres:
    """A server on a socket and a free port, with a password."""

    def __init__(self, root: Path, port: int) -> None:
        """Args: root, empty, whose parents everybody may pass; port, of the loopback address."""
        found = sorted(PACKAGES.glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
        if not found:
            pytest.skip(f"no PostgreSQL below {PACKAGES}: apt-get install postgresql")
        self._binaries, self._root, self.port = found[-1].parent, root, port
        self.password = secrets.token_hex(16)

    def __enter__(self) -> Self:
        self._root.mkdir(parents=True)
        password = self._root / "password"
        password.write_text(self.password)
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            shutil.chown(self._root, "nobody")
            shutil.chown(password, "nobody")
        data = str(self._root / "data")
        self._call("initdb", "--pgdata", data, "--username=mlflow", "--auth=scram-sha-256", f"--pwfile={password}")
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories={self._root}"
        self._call("pg_ctl", "start", "--wait", "--pgdata", data, "--log", str(self._root / "log"), "-o", options)
        self._call("createdb", "mlflow")
        return self

    def __exit__(self, *_: object) -> None:
        self._call("pg_ctl", "stop", "--mode=immediate", "--wait", "--pgdata", str(self._root / "data"))

    @property
    def environment(self) -> dict[str, str]:
        """How libpq finds it."""
        return {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow", "PGPASSWORD": self.password}

    def query(self, text: str) -> str:
        """Rows of one statement in the database `mlflow`, a line each."""
        return self._call("psql", "--no-align", "--tuples-only", "--command", text, "mlflow")

    def _call(self, name: str, *arguments: str) -> str:
        # What a server inherits of pipes keeps them open, so its output goes to files.
        user = pwd.getpwnam("nobody").pw_uid if os.getuid() == 0 else None
        log = self._root / f"{name}.out"
        with log.open("w+") as output:
            done = subprocess.run(
                [self._binaries / name, *arguments],
                env={**os.environ, **self.environment, "HOME": str(self._root)},
                cwd=self._root,
                user=user,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        assert done.returncode == 0, f"{name}: {log.read_text()}"
        return log.read_text()
