"""Versions here and on the cluster, compared before anything else is submitted.

The job server tells Ray's version alone, so a job of a second asks the cluster's Python for all of them. Its log stays
on the cluster and answers the next command, too.
"""

import json
import platform
import shlex
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from ray.job_submission import JobStatus

from pipelines.console import Console
from pipelines.job_server import JobServer
from pipelines.submit_attempts import STAGE_KEY, latest_attempt, next_attempt
from pipelines.submit_watch import wait
from userrep.config import ConfigError, digest_json

EQUAL = ("python", "ray")  # Ray sends pickled objects between the two, so patch levels count
NAMES = ("ray", "torch", "pyarrow", "mlflow", "pydantic", "typer")
MARK = "versions of this cluster: "
PROBE = f"""
import importlib.metadata as m, json, platform
found = {{"python": platform.python_version()}}
for name in {NAMES!r}:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        found[name] = ""
print({MARK!r} + json.dumps(found))
"""
PROBE_LIMIT_S = 300.0  # assumption: a head that cannot start a process in this time is no place for a job


@dataclass(frozen=True)
class Comparison:
    """Empty lists: no difference.

    Attributes:
        problems: for which a job cannot run.
        differences: that may change its numbers.
    """

    problems: list[str]
    differences: list[str]


def local_versions() -> dict[str, str]:
    """Versions of Python and of `NAMES` here; empty: not installed."""
    found = {"python": platform.python_version()}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def cluster_versions(server: JobServer, python: str, console: Console) -> dict[str, str]:
    """Versions as `local_versions`, of an interpreter on the head of the cluster.

    Args:
        server: of the cluster.
        python: the interpreter.
        console: for progress.

    Raises:
        ConfigError: there is no such interpreter.
        RuntimeError: the cluster could not say.
    """
    base = f"userrep-versions-{digest_json([python, PROBE])}"
    latest = latest_attempt(server.jobs(), base)
    if latest is None or (latest.status.is_terminal() and latest.status != JobStatus.SUCCEEDED):
        submission_id = next_attempt(latest, base)
        console.say(f"submit: asking {server.address} for its versions")
        server.submit(shlex.join([python, "-c", PROBE]), submission_id, metadata={STAGE_KEY: "versions"})
    else:
        submission_id = str(latest.submission_id)
    code = wait(server, submission_id, limit_s=PROBE_LIMIT_S)
    lines = [line for line in server.log(submission_id).splitlines() if line.startswith(MARK)]
    if code == 127 or (code and not lines):
        raise ConfigError(f"the cluster cannot run {python!r} (exit code {code}): name its interpreter with --python")
    if not lines:
        raise RuntimeError(f"job {submission_id} on {server.address} has not told its versions; see its log")
    return json.loads(lines[-1].removeprefix(MARK))


def compare_versions(here: dict[str, str], there: dict[str, str]) -> Comparison:
    """What keeps a job of this code from running there, and what else differs."""
    problems, differences = [], []
    for name, own in here.items():
        other = there.get(name, "")
        if name in EQUAL and own != other:
            problems.append(f"{name} is {own} here and {other or 'missing'} on the cluster")
        elif not other and own:
            problems.append(f"the cluster lacks {name}")
        elif own != other:
            differences.append(f"{name} is {own} here and {other} on the cluster")
    return Comparison(problems, differences)


def check_versions(server: JobServer, python: str, console: Console) -> None:
    """Refuses a cluster on which this code cannot run.

    Raises:
        ConfigError: Ray or Python differ, or packages are missing.
    """
    found = compare_versions(local_versions(), cluster_versions(server, python, console))
    if found.problems:
        raise ConfigError(
            f"{server.address} cannot run this job: {'; '.join(found.problems)}. Submit from an environment with the "
            "cluster's versions, or give its nodes an image with Python and packages of constraints.txt"
        )
    for difference in found.differences:
        console.say(f"submit: warning: {difference}")
