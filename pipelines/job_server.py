"""Ray's job server: who may be spoken to, with which token, and what its answers mean.

Whoever reaches a job server may run any code on its cluster, so an open one is not used by accident. The token is read
here and goes nowhere but into the header of a request: no command line, no log, no runtime environment holds it.
"""

import ipaddress
import logging
import os
import stat
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient

from pipelines.console import Console
from userrep.config import ConfigError

TOKEN, TOKEN_PATH, AUTH_MODE = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"
SOURCES = f"{TOKEN}, or the path of a file with mode 0600 as {TOKEN_PATH}"


@dataclass(frozen=True)
class Token:
    """The token of a cluster, and where it was found."""

    value: str = field(repr=False)
    source: str


def read_token(environment: Mapping[str, str]) -> Token | None:
    """The token that Ray itself would use; None where there is none, or RAY_AUTH_MODE=disabled.

    Args:
        environment: RAY_AUTH_TOKEN comes before RAY_AUTH_TOKEN_PATH, and that before `~/.ray/auth_token`.

    Raises:
        ConfigError: its file is missing or readable by others, or it is none.
    """
    if environment.get(AUTH_MODE, "").lower() == "disabled":
        return None
    if value := environment.get(TOKEN, "").strip():
        return _check_token(value, TOKEN)
    named = environment.get(TOKEN_PATH, "")
    path = Path(named) if named else Path(environment.get("HOME") or Path.home()) / ".ray" / "auth_token"
    try:
        with path.open() as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            value = stream.read().strip()
    except FileNotFoundError:
        if named:
            raise ConfigError(f"{TOKEN_PATH}={named} does not exist: give the path of the cluster's token") from None
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the token in {path} cannot be read ({type(error).__name__}): give {SOURCES}") from None
    if mode & 0o077:
        raise ConfigError(f"{path} holds the cluster's token and has mode {mode:04o}, so others can: chmod 600 {path}")
    return _check_token(value, str(path))


def _check_token(value: str, source: str) -> Token:
    # The HTTP library would refuse it too, in an error that shows the header.
    if not value or not all("!" <= character <= "~" for character in value):
        raise ConfigError(f"{source} holds no token: one is printable ASCII without spaces")
    return Token(value, source)


def check_address(address: str) -> str:
    """The address without a slash at its end.

    Raises:
        ConfigError: it is no http or https URL, or has credentials in it.
    """
    if "@" in address:  # not shown
        raise ConfigError(
            f"--address holds credentials, and command lines are seen by others: take them out, give {SOURCES}"
        )
    try:
        parts = urlsplit(address)
        is_server = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        is_server = is_server and not parts.query and not parts.fragment
    except ValueError:  # no number as port, or half an IPv6 address
        is_server = False
    if not is_server:
        raise ConfigError(
            f"--address {address!r} is not the URL of a job server: give e.g. http://127.0.0.1:8265 or https://HOST"
        )
    return address.rstrip("/")


def is_loopback(address: str) -> bool:
    """Whether the host of a URL is this machine, judged by its name alone."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_transport(address: str, token: Token | None, is_insecure: bool) -> str:
    """Decides whether an address may be used.

    Args:
        address: of `check_address`.
        token: of `read_token`.
        is_insecure: `--insecure`.

    Returns:
        What is to be said about it; empty: nothing.

    Raises:
        ConfigError: plain http to another machine, and no `--insecure`.
    """
    if address.startswith("https://") or is_loopback(address):
        return ""
    if token is None:
        problem = (
            f"{address} is plain http to another machine, and there is no token: whoever reaches it runs code there"
        )
        advice = f"give {SOURCES}, and start the cluster with {AUTH_MODE}=token"
    else:
        problem = f"{address} is plain http to another machine: the token of {token.source} would travel in clear"
        advice = "use https, or a tunnel to 127.0.0.1 (ssh -L, kubectl port-forward)"
    if not is_insecure:
        raise ConfigError(f"{problem}; {advice}. --insecure goes on nevertheless")
    return f"warning: {problem}; going on because of --insecure"


class JobServer:
    """A job server whose errors say what to do."""

    def __init__(self, client: JobSubmissionClient, address: str, token: Token | None = None) -> None:
        self.client, self.address, self.token = client, address, token

    def jobs(self) -> dict[str, JobDetails]:
        """All jobs that were submitted, by submission id."""
        with explained(self.address):
            return {job.submission_id: job for job in self.client.list_jobs() if job.submission_id}

    def job(self, submission_id: str) -> JobDetails:
        """One job.

        Raises:
            ConfigError: there is no such job.
        """
        with explained(self.address, submission_id):
            return self.client.get_job_info(submission_id)

    def submit(self, entrypoint: str, submission_id: str, **arguments: Any) -> None:
        """Submits a job; arguments as of `JobSubmissionClient.submit_job`."""
        with explained(self.address):
            self.client.submit_job(entrypoint=entrypoint, submission_id=submission_id, **arguments)

    def stop(self, submission_id: str) -> bool:
        """Asks a job to end; False when it had ended already."""
        with explained(self.address, submission_id):
            return self.client.stop_job(submission_id)

    def log(self, submission_id: str) -> str:
        """What a job has written so far."""
        with explained(self.address, submission_id):
            return self.client.get_job_logs(submission_id)

    async def tail(self, submission_id: str) -> AsyncGenerator[str, None]:
        """What a job writes, from its beginning until it ends or the connection does."""
        with explained(self.address, submission_id):
            async for text in self.client.tail_job_logs(submission_id):
                yield text


def connect(
    address: str, console: Console, *, is_insecure: bool = False, environment: Mapping[str, str] | None = None
) -> JobServer:
    """Connects to a job server.

    Args:
        address: e.g. http://127.0.0.1:8265.
        console: for warnings.
        is_insecure: go on where the transport is refused.
        environment: where the token is looked for; default: this process's.

    Raises:
        ConfigError: address or token cannot be used, or the server refuses the token.
        RuntimeError: no job server answers there.
    """
    address = check_address(address)
    token = read_token(os.environ if environment is None else environment)
    if said := check_transport(address, token, is_insecure):
        console.say(said)
    for name in (
        "ray.dashboard.modules.dashboard_sdk",
        "ray.dashboard.modules.job.sdk",
        "ray._private.runtime_env.packaging",
    ):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of temporary files and closed sockets
    headers = {"Authorization": f"Bearer {token.value}"} if token else {}
    with explained(address):
        return JobServer(JobSubmissionClient(address, headers=headers), address, token)


@contextmanager
def explained(address: str, submission_id: str = "") -> Iterator[None]:
    """Turns errors of Ray's client into ones that say what to do.

    Raises:
        ConfigError: the server refuses the token, or there is no such job.
        RuntimeError: it does not answer, or answers with an error.
    """
    try:
        yield
    except AuthenticationError as error:
        if "Authentication required" in error.message:  # 401; 403 otherwise
            raise ConfigError(f"{address} asks for a token and got none: give {SOURCES}") from None
        raise ConfigError(f"{address} refuses this token: give that of the cluster as {SOURCES}") from None
    except (OSError, aiohttp.ClientError) as error:  # also those of the HTTP library, and of Ray's client
        raise RuntimeError(
            f"no job server answers at {address} ({type(error).__name__}): is it the address of the dashboard, "
            "usually port 8265, and does the cluster run?"
        ) from None
    except RuntimeError as error:
        text = str(error).strip().rstrip(".").strip()
        if submission_id and "does not exist" in text:
            raise ConfigError(f"{address} has no job {submission_id}: `userrep jobs list` shows them") from None
        raise RuntimeError(f"{address} answers with an error: {text.splitlines()[-1] if text else error}") from None
