"""`userrep submit` and `userrep jobs ...`: jobs on a Ray cluster, from here. Imports Ray when they run."""

import os
import sys
import time
from typing import Annotated, NoReturn

import typer

from pipelines.options import InsecureOption

AddressOption = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="Job server, e.g. http://127.0.0.1:8265."),
]
FollowOption = Annotated[bool, typer.Option("--follow", help="Show the log until the job ends, return its exit code.")]
DETACHED = 130  # exit code, as of a command that Ctrl-C has ended

jobs = typer.Typer(help="Jobs on a Ray cluster: list, logs, stop.", no_args_is_help=True)


def submit(
    words: Annotated[
        list[str], typer.Argument(metavar="STAGE ...", help="A command and its options, e.g. `run --config demo`.")
    ],
    address: AddressOption,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end, and return the job's exit code.")] = False,
    follow: FollowOption = False,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", help="Name of a variable that the job gets from here; MLFLOW_TRACKING_URI always is."),
    ] = None,
    python: Annotated[str, typer.Option("--python", help="Interpreter on the cluster's machines.")] = "python",
    driver_cpus: Annotated[
        float, typer.Option("--driver-cpus", min=0.0, help="Run the command on any node with so many free CPUs.")
    ] = 0.0,
    again: Annotated[bool, typer.Option("--again", help="Submit it also when it has succeeded already.")] = False,
    insecure: InsecureOption = False,
) -> None:
    """Run a command on a Ray cluster with the code that is here; the same command again finds the same job.

    Options that are not listed here are those of STAGE. --workdir and --data are absolute paths on storage that all
    nodes share.
    """
    from pipelines import submit as jobs_submit
    from pipelines.console import Console
    from pipelines.job_server import connect
    from pipelines.submit_command import parse_command
    from pipelines.submit_package import find_package
    from pipelines.submit_watch import follow as follow_job
    from pipelines.submit_watch import wait as wait_for_job

    console, command, package = Console(), parse_command(words), find_package()
    server = connect(address, console, is_insecure=insecure)
    variables = jobs_submit.choose_environment(env or [], os.environ, server.token.value if server.token else "")
    place = jobs_submit.Placement(python, driver_cpus)
    job = jobs_submit.submit(server, command, package, variables, console, place, again=again)
    if not wait and not follow:
        sys.stdout.write(job.submission_id + "\n")
        return
    try:
        code = follow_job(server, job.submission_id, _write) if follow else wait_for_job(server, job.submission_id)
    except KeyboardInterrupt:
        _detach(server.address, job.submission_id)
    console.say(f"submit: {job.submission_id} is {server.job(job.submission_id).status}")
    raise typer.Exit(code)


@jobs.command("list")
def list_jobs(
    address: AddressOption,
    everything: Annotated[bool, typer.Option("--all", help="Also jobs that `userrep submit` has not made.")] = False,
    insecure: InsecureOption = False,
) -> None:
    """Show the jobs of a cluster, the newest last."""
    from pipelines.console import Console
    from pipelines.job_server import connect
    from pipelines.submit_attempts import STAGE_KEY

    found = connect(address, Console(), is_insecure=insecure).jobs()
    for submission_id, job in sorted(found.items(), key=lambda item: item[1].start_time or 0):
        metadata = job.metadata or {}
        if everything or STAGE_KEY in metadata:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
            code = "" if job.driver_exit_code is None else job.driver_exit_code
            line = f"{submission_id:44} {job.status:9} {code!s:>4}  {started}  {metadata.get('workdir', '')}"
            sys.stdout.write(line.rstrip() + "\n")


@jobs.command()
def logs(
    job: Annotated[str, typer.Argument(help="Submission id.")],
    address: AddressOption,
    follow: FollowOption = False,
    insecure: InsecureOption = False,
) -> None:
    """Show what a job has written."""
    from pipelines.console import Console
    from pipelines.job_server import connect
    from pipelines.submit_watch import follow as follow_job

    server = connect(address, Console(), is_insecure=insecure)
    if not follow:
        sys.stdout.write(server.log(job))
        return
    try:
        raise typer.Exit(follow_job(server, job, _write))
    except KeyboardInterrupt:
        _detach(server.address, job)


@jobs.command()
def stop(
    job: Annotated[str, typer.Argument(help="Submission id.")], address: AddressOption, insecure: InsecureOption = False
) -> None:
    """End a job; what it has finished stays in its working directory, and the same `userrep submit` goes on there."""
    from pipelines.console import Console
    from pipelines.job_server import connect

    console = Console()
    if connect(address, console, is_insecure=insecure).stop(job):
        console.say(f"jobs: {job} is being stopped")
    else:
        console.say(f"jobs: {job} had ended already")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _detach(address: str, submission_id: str) -> NoReturn:
    sys.stderr.write(
        f"\nuserrep: detached; {submission_id} goes on. See it again: userrep jobs logs {submission_id} --follow "
        f"--address {address}; end it: userrep jobs stop {submission_id} --address {address}\n"
    )
    raise typer.Exit(DETACHED)
