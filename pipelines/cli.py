"""Command line. Stages are imported when they run, so that `userrep pull` starts without torch and ray."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines import cluster_cli, continual_cli, finetune_cli, submit_cli, sweep_cli, tables_cli
from pipelines.options import DataOption, LocalWorkdirOption, SetOption, UriOption, VerboseOption, any_path
from userrep.mirror import shown

if TYPE_CHECKING:
    from pipelines.config import JobConfig
    from pipelines.job import Job

app = typer.Typer(
    help="Events in, versioned user embedding tables out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(sweep_cli.app, name="sweep")
app.add_typer(cluster_cli.app, name="cluster")
app.add_typer(tables_cli.app, name="tables")
app.command("continual")(continual_cli.continual)
app.command("finetune")(finetune_cli.finetune)
# Options that it does not know are those of the command that it submits.
app.command("submit", context_settings={"ignore_unknown_options": True})(submit_cli.submit)
app.add_typer(submit_cli.jobs, name="jobs")

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="A named config (see `userrep show-config --list`) or a YAML/JSON file.")
]
WorkdirOption = Annotated[
    Path,
    typer.Option(
        "--workdir",
        "-w",
        parser=any_path,
        help="Path or s3:// for tables, runs and the report. Rerunning continues there.",
    ),
]
STAGE_HELP = {
    "ingest": "Read raw events into validated, self-contained shards.",
    "tokenize": "Turn item texts of the shards into token ids.",
    "pretrain": "Train the user encoder by contrasting users' views; resumes where it stopped.",
    "teach": "Teach the encoder the config's tasks, one after another, without forgetting; resumes where it stopped.",
    "evaluate": "Measure retrieval on held-out users, against baselines.",
    "embed": "Encode every user into the embedding table.",
    "publish": "Register the table as a new version and move its alias.",
}


def _stage_command(stage: str) -> None:
    def command(
        config: ConfigOption = "demo",
        workdir: WorkdirOption = Path("jobs"),
        data: DataOption = None,
        overrides: SetOption = None,
        verbose: VerboseOption = False,
    ) -> None:
        from pipelines.run import run_stage

        run_stage(_job(config, workdir, data, overrides, verbose), stage)

    app.command(stage, help=STAGE_HELP[stage])(command)


def _embed_command(
    config: ConfigOption = "demo",
    workdir: WorkdirOption = Path("jobs"),
    data: DataOption = None,
    overrides: SetOption = None,
    since: Annotated[
        str,
        typer.Option(
            "--since", help="An earlier table, its directory or NAME@ALIAS: encode only users with new events since."
        ),
    ] = "",
    verbose: VerboseOption = False,
) -> None:
    """As other stages; the table is the same with and without --since."""
    from pipelines.run import run_stage

    run_stage(_job(config, workdir, data, overrides, verbose), "embed", since=since)


for _stage in STAGE_HELP:
    if _stage == "embed":
        app.command(_stage, help=STAGE_HELP[_stage])(_embed_command)
    else:
        _stage_command(_stage)


@app.command()
def run(
    config: ConfigOption = "demo",
    workdir: WorkdirOption = Path("jobs"),
    data: DataOption = None,
    overrides: SetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the resolved config and what would run, then stop.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Run all stages in order, skip what is complete and unchanged, write summary.json and report.html."""
    job = _job(config, workdir, data, overrides, verbose)
    from pipelines import run as main_job

    if dry_run:
        _print(job.config.model_dump(mode="json"))
        tables = {name: stage.table for name, stage in main_job.stages_of(job.config).items()}
        for stage, state in job.plan(tables).items():
            job.console.say(f"{stage}: {state}")
        return
    summary = main_job.run(job)
    _print(summary)
    job.console.say(f"report: {shown(job.workdir / 'report.html')}")


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@v12 or NAME/12.")],
    to: Annotated[Path, typer.Option("--to", help="Directory of the table; default: its name.")] = Path(),
    aligned_to: Annotated[
        str | None,
        typer.Option("--aligned-to", help="v12, or an alias: turn the vectors into the space of that version."),
    ] = None,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Download a published table, verify every file, and print what it is. An interrupted pull is resumed."""
    from pipelines.console import Console
    from pipelines.mlflow_store import tracking_uri as choose_uri
    from userrep.publishing.client import pull as pull_table

    uri = choose_uri(workdir, tracking_uri)
    target = to if to != Path() else Path(reference.replace("@", "/").split("/")[0])
    with Console(verbose).progress(f"pull: {reference}", "MB") as advance:
        table = pull_table(
            reference,
            target,
            tracking_uri=uri,
            aligned_to=aligned_to,
            on_progress=lambda done, total: advance(done, total, done // 1_000_000),
            verbose=verbose,
        )
    _print({"directory": str(table.directory), "rows_are": f"{table.entity.name}s", **table.manifest.facts})


@app.command("show-config")
def show_config(
    config: ConfigOption = "demo",
    data: DataOption = None,
    overrides: SetOption = None,
    list_names: Annotated[bool, typer.Option("--list", help="List the named configs with what they are for.")] = False,
) -> None:
    """Print a resolved config as YAML, ready to be edited and given to --config."""
    import yaml

    from pipelines.experiments.catalog import describe_configs

    if list_names:
        for name, description in describe_configs().items():
            sys.stdout.write(f"{name:20} {description}\n")
        return
    sys.stdout.write(yaml.safe_dump(_config(config, data, overrides).model_dump(mode="json"), sort_keys=False))


@app.command("sync-tracking")
def sync_tracking(workdir: WorkdirOption = Path("jobs"), tracking_uri: UriOption = None) -> None:
    """Send MLflow what it lacks of the runs in --workdir, after it was away. Repeating it changes nothing."""
    from pipelines.mlflow_store import tracking_uri as choose_uri
    from pipelines.tracking import sync

    is_complete = True
    for has_everything, line in sync(workdir.resolve(), choose_uri(workdir, tracking_uri)):
        sys.stdout.write(line + "\n")
        is_complete &= has_everything
    if not is_complete:
        raise typer.Exit(1)


@app.command()
def chaos(
    kills: Annotated[int, typer.Option("--kills", min=1, help="Faults, one in each run.")] = 5,
    seed: Annotated[int, typer.Option("--seed", help="Of the schedule of faults.")] = 0,
    workdir: LocalWorkdirOption = Path("jobs/chaos"),
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Of the Ray cluster; with several, nodes die.")] = 1,
) -> None:
    """Train under a seeded schedule of faults, and compare every run with one that nothing disturbed."""
    from pipelines.chaos import run_chaos

    raise typer.Exit(run_chaos(kills, seed, workdir, nodes))


@app.command()
def doctor(
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    fix: Annotated[bool, typer.Option("--fix", help="Set runs to KILLED in MLflow whose job is dead.")] = False,
) -> None:
    """Check versions, cores, memory, ports, storage, MLflow and Ray; say what to do about each problem."""
    from pipelines.doctor import diagnose

    findings = diagnose(workdir, tracking_uri, fix)
    for finding in findings:
        sys.stdout.write(f"{finding.level:5} {finding.what}: {finding.detail}\n")
    if any(finding.level == "FAIL" for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: a user's mistake, or a failed run, ends with one clear message; `-v` shows the traceback."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = "tables" if error.name == "numpy" else "train"
        sys.stderr.write(f"userrep: this command needs {error.name}: pip install 'userrep[{extra}]'\n")
        raise SystemExit(1) from error
    except (ValueError, RuntimeError) as error:
        if "--verbose" in sys.argv or "-v" in sys.argv:
            raise
        sys.stderr.write(f"userrep: {error}\n")
        raise SystemExit(1) from error


def _config(config: str, data: Path | None, overrides: list[str] | None) -> "JobConfig":
    from pipelines.experiments.catalog import load_config

    return load_config(config, data, overrides or [])


def _job(config: str, workdir: Path, data: Path | None, overrides: list[str] | None, verbose: bool) -> "Job":
    from pipelines.console import Console
    from pipelines.job import Job
    from pipelines.mlflow_store import quiet_mlflow

    job = Job(_config(config, data, overrides), workdir.resolve(), Console(verbose))
    if not verbose:
        quiet_mlflow()
    return job


def _print(value: object) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
