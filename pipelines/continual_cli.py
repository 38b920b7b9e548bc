"""Command `userrep continual`. What computes is imported when it runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import DataOption, LocalWorkdirOption, SetOption, UriOption, VerboseOption

if TYPE_CHECKING:
    from pipelines.continual_config import ContinualJobConfig


def continual(
    config: Annotated[
        str, typer.Option("--config", "-c", help="smoke, synthetic, ml1m, ml1m_sampling, or a YAML/JSON file.")
    ],
    workdir: LocalWorkdirOption = Path("jobs"),
    data: DataOption = None,
    methods: Annotated[str, typer.Option("--methods", help="Comma-separated, e.g. teracon,hat; default: all.")] = "",
    order: Annotated[
        list[str] | None, typer.Option("--order", help="Tasks, comma-separated, `noise` among them. Repeatable.")
    ] = None,
    seeds: Annotated[str, typer.Option("--seeds", help="Comma-separated, e.g. 0,1,2.")] = "",
    overrides: SetOption = None,
    continue_from: Annotated[
        str,
        typer.Option(
            "--continue-from",
            help="Teach a published model its next tasks: NAME@ALIAS, NAME@v12 or NAME/12. Method, seed and training "
            "are the model's; --order begins with its tasks, default: all tasks that it does not have.",
        ),
    ] = "",
    publish: Annotated[
        str,
        typer.Option(
            "--publish", help="NAME[@ALIAS], default alias champion: register the model. One method, seed and order."
        ),
    ] = "",
    tracking_uri: UriOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show config and cells, then stop.")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Teach an encoder task after task by several methods, compare them, and write tables and figures."""
    from pipelines import continual as stage
    from pipelines.console import Console
    from pipelines.continual_model import check_publishing, continued, publish_model, pull_model
    from pipelines.experiments.catalog import load_continual_config
    from pipelines.mlflow_store import quiet_mlflow
    from pipelines.mlflow_store import tracking_uri as choose_uri

    workdir = workdir.resolve()
    uri = choose_uri(workdir, tracking_uri)
    model = pull_model(continue_from, workdir, uri, verbose=verbose) if continue_from else None
    cell = model.cell if model else None
    resolved = load_continual_config(config, data, overrides or [], methods, order or [], seeds, cell)
    if model:
        resolved = continued(resolved, model)
    if dry_run:
        _print_cells(resolved)
        return
    if not verbose:
        quiet_mlflow()
    console = Console(verbose)
    if publish:
        workdir.mkdir(parents=True, exist_ok=True)
        check_publishing(resolved, publish, uri, verbose=verbose)
    done = stage.run(resolved, workdir, console, uri, [model.directory] if model else [])
    sys.stdout.write((done.report / "tasks.md").read_text())
    console.say(f"report: {done.report}")
    if publish:
        made = publish_model(done.cells[0], publish, resolved.experiment, workdir, uri, verbose=verbose)
        console.say(f"continual: {made.name}@{made.alias} is version {made.version}")


def _print_cells(config: "ContinualJobConfig") -> None:
    sys.stdout.write(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    for cell in config.cells(config.build_tasks()):
        sys.stderr.write(f"{cell.label}, seed {cell.seed}: {' > '.join(cell.order)}\n")
