"""`userrep submit`: a command of a job, run on a Ray cluster by its job server, with the code that is here.

The submission id is made of what the command means, so the same command finds the job that it has started before.
"""

import re
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray.job_submission import JobDetails, JobStatus

from pipelines.console import Console
from pipelines.job_server import AUTH_MODE, TOKEN, TOKEN_PATH, JobServer
from pipelines.submit_attempts import STAGE_KEY, latest_attempt, next_attempt
from pipelines.submit_command import StageCommand
from pipelines.submit_package import Package, write_package
from pipelines.submit_versions import check_versions
from userrep.config import ConfigError

TRACKING_URI = "MLFLOW_TRACKING_URI"
OWN = (TOKEN, TOKEN_PATH, AUTH_MODE, "RAY_ADDRESS")  # a job gets these from its node
DEFAULT_PYTHON = "python"


@dataclass(frozen=True)
class Placement:
    """Where on the cluster the command runs.

    Attributes:
        python: interpreter.
        num_cpus: that it takes on any node; 0: it runs on the head and takes none.
    """

    python: str = DEFAULT_PYTHON
    num_cpus: float = 0.0


@dataclass(frozen=True)
class Submitted:
    """A job, and whether this call has submitted it."""

    submission_id: str
    is_new: bool


def choose_environment(names: Sequence[str], environment: Mapping[str, str], token: str = "") -> dict[str, str]:
    """The variables that go with a job: those named, and MLFLOW_TRACKING_URI where it is set.

    Args:
        names: of `--env`.
        environment: of this process, which has their values.
        token: of the cluster.

    Raises:
        ConfigError: a name that is none or is not set, or a value that holds the cluster's token.
    """
    chosen = {TRACKING_URI: environment[TRACKING_URI]} if environment.get(TRACKING_URI) else {}
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            shown = name.partition("=")[0]  # what follows may be a secret
            raise ConfigError(
                f"--env {shown}... is no name of a variable: give the name alone, its value is taken from here"
            )
        if name in OWN:
            raise ConfigError(f"--env {name}: a job has that from the node that it runs on, leave it out")
        if name not in environment:
            raise ConfigError(f"--env {name}: there is no such variable here, export it first")
        chosen[name] = environment[name]
    for name, value in chosen.items():
        if token and token in value:
            raise ConfigError(f"{name} holds the cluster's token, which must not be kept with a job")
    return chosen


def redact_uri(uri: str) -> str:
    """A URI without its credentials."""
    return re.sub(r"://[^/@]*@", "://[redacted]@", uri)


def submit(
    server: JobServer,
    command: StageCommand,
    package: Package,
    variables: Mapping[str, str],
    console: Console,
    placement: Placement | None = None,
    *,
    again: bool = False,
) -> Submitted:
    """Submits a command, unless the same one waits, runs, or has succeeded already.

    Args:
        server: of the cluster.
        command: to be run.
        package: the code.
        variables: environment of the job; kept by the cluster, where whoever has its token can read them.
        console: for progress; no values of variables but a redacted MLFLOW_TRACKING_URI are shown.
        placement: where it runs; default: on the head.
        again: also when it has succeeded.

    Raises:
        ConfigError: the cluster's versions differ, or the token is a part of the command.
        RuntimeError: the server answers with an error.
    """
    place = placement or Placement()
    if server.token and any(server.token.value in text for text in _texts(command)):
        raise ConfigError(
            "the command or its config holds the cluster's token, and both are kept with the job: take it out"
        )
    base = f"userrep-{command.stage.replace(' ', '-')}-{command.digest}"
    latest = latest_attempt(server.jobs(), base)
    if found := _existing(latest, package, console, again=again):
        return found
    check_versions(server, place.python, console)
    submission_id = next_attempt(latest, base)
    entrypoint = shlex.join([place.python, "-m", "pipelines.cli", *command.words])
    if TRACKING_URI in variables:
        console.say(f"submit: {TRACKING_URI} is {redact_uri(variables[TRACKING_URI])}")
    if others := sorted(set(variables) - {TRACKING_URI}):
        console.say(f"submit: the job gets {', '.join(others)} from here")
    try:
        with tempfile.TemporaryDirectory(prefix="userrep-submit-") as directory:
            write_package(package, Path(directory), command.sent)
            server.submit(
                entrypoint,
                submission_id,
                runtime_env={"working_dir": directory, "env_vars": dict(variables)},
                metadata={STAGE_KEY: command.stage, "workdir": command.workdir, "package": package.digest},
                entrypoint_num_cpus=place.num_cpus or None,
            )
    except RuntimeError:
        # Another command may have submitted the same id since it was looked for.
        raced = server.jobs().get(submission_id)
        if raced is None:
            raise
        console.say(f"submit: another command has just submitted {submission_id}")
        return Submitted(submission_id, is_new=False)
    size = f"{len(package.files)} files of {package.num_bytes / 2**20:.1f} MiB"
    console.say(f"submit: {submission_id} submitted to {server.address} with {size}")
    console.say(f"submit: {command.workdir} must be storage that all nodes share")
    return Submitted(submission_id, is_new=True)


def _texts(command: StageCommand) -> list[str]:
    return [*command.words, *(content.decode(errors="replace") for content in command.sent.values())]


def _existing(latest: JobDetails | None, package: Package, console: Console, *, again: bool) -> Submitted | None:
    """The job that makes another one superfluous."""
    if latest is None:
        return None
    submission_id = str(latest.submission_id)
    if latest.status.is_terminal() and latest.status != JobStatus.SUCCEEDED:
        console.say(f"submit: {submission_id} is {latest.status}, submitting it anew")
        return None
    if latest.status.is_terminal():
        if not again:
            console.say(f"submit: {submission_id} has succeeded already; --again submits it anew")
        return None if again else Submitted(submission_id, is_new=False)
    console.say(f"submit: {submission_id} is {latest.status} already")
    if (latest.metadata or {}).get("package") != package.digest:
        console.say("submit: warning: it runs other code than is here; stop it to submit this")
    return Submitted(submission_id, is_new=False)
