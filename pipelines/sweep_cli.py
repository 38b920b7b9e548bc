"""`userrep sweep ...`: plan, run, watch and fit scaling-law sweeps. Stages are imported when they run."""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines.options import DataOption, InsecureOption, VerboseOption, local_path
from pipelines.sweep_schedule_cli import schedule
from userrep.config import ConfigError

app = typer.Typer(help="Scaling-law sweeps: planned, priced, run, fitted.", no_args_is_help=True)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help="sweep_smoke, sweep_synthetic, sweep_amazon2014, or a YAML/JSON file.")
]
WorkdirOption = Annotated[
    Path,
    typer.Option(
        "--workdir", "-w", parser=local_path, help="Where data, cells and the report go. Rerunning continues there."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override, e.g. lanes.num_lanes=4. Repeatable.")
]
FlopsOption = Annotated[
    float | None,
    typer.Option("--flops-per-s", min=1.0, help="Throughput of a lane; default: measured here, once per sweep."),
]


@app.command()
def plan(
    config: ConfigOption,
    workdir: WorkdirOption = Path("jobs/sweep"),
    data: DataOption = None,
    overrides: SetOption = None,
    flops_per_s: FlopsOption = None,
    price: Annotated[
        float | None, typer.Option("--price-per-hour", min=0.0, help="Of a lane's hour; shows what the sweep costs.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="How every size came to be: formulas and sources.")
    ] = False,
    verbose: VerboseOption = False,
) -> None:
    """Show the cells with operations, hours, memory and cost; starts none. Makes the data where they are missing."""
    from pipelines.sweep import sole_command
    from pipelines.sweep_status import derivations

    with sole_command(workdir.resolve()):
        planned, throughput, lanes = _plan(config, workdir, data, overrides, flops_per_s, verbose)
    if explain:
        sys.stdout.write(derivations(planned) + "\n\n")
    _show(planned, throughput, lanes, price)


@app.command()
def run(
    config: ConfigOption,
    workdir: WorkdirOption = Path("jobs/sweep"),
    data: DataOption = None,
    overrides: SetOption = None,
    flops_per_s: FlopsOption = None,
    max_hours: Annotated[
        float | None, typer.Option("--max-hours", min=0.0, help="Leave out cells that would not end by then.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Also run cells again that have diverged.")
    ] = False,
    compare_with: Annotated[
        Path | None, typer.Option("--compare-with", help="Working directory of an earlier sweep, to see drift.")
    ] = None,
    jobs_address: Annotated[
        str, typer.Option("--jobs-address", help="Run every cell as a Ray job of its own there, e.g. http://HOST:8265.")
    ] = "",
    job_python: Annotated[
        str, typer.Option("--job-python", help="With --jobs-address: interpreter on the cluster's machines.")
    ] = "python",
    insecure: InsecureOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the cells that are not finished, the most expensive first; then fit, and write the report."""
    from pipelines import sweep
    from pipelines.console import Console
    from pipelines.sweep_finish import earlier_fit, finish
    from pipelines.sweep_lanes import run_lanes

    console, workdir = Console(verbose), workdir.resolve()
    earlier = earlier_fit(compare_with)
    if jobs_address and max_hours is not None:
        raise ConfigError("--max-hours is for lanes: with --jobs-address the cluster's scheduler starts the cells")
    with sweep.sole_command(workdir):
        planned, throughput, lanes = _plan(config, workdir, data, overrides, flops_per_s, verbose)
        _show(planned, throughput, lanes, None)
        execute = partial(run_lanes, planned, throughput, max_hours, console)
        if jobs_address:
            from pipelines.sweep_jobs import run_jobs

            execute = partial(run_jobs, planned, workdir, jobs_address, job_python, console, insecure)
        outcome = sweep.run(planned, workdir, console, execute, retry_failed)
        sys.stdout.write(finish(planned, outcome, workdir, earlier, console) + "\n")
    if outcome.passed_over:
        console.say(f"sweep: no time was left for {len(outcome.passed_over)} cells; the same command runs them")
    for cell_id, failure in outcome.failures.items():
        console.say(f"sweep: cell {cell_id} {failure['message']}")
    if not all(failure["is_final"] for failure in outcome.failures.values()):
        raise RuntimeError("sweep: cells have failed that may succeed when they are run again; see above")


@app.command(hidden=True)
def cell(
    cell_id: Annotated[str, typer.Argument(help="Id of the cell.")], workdir: WorkdirOption = Path("jobs/sweep")
) -> None:
    """Run one cell of a planned sweep in this process: what a job of --jobs-address does."""
    from pipelines.sweep_jobs import run_one

    run_one(workdir.resolve(), cell_id)


@app.command()
def status(
    workdir: WorkdirOption = Path("jobs/sweep"),
    watch: Annotated[bool, typer.Option("--watch", help="Show it anew, until no lane is at work.")] = False,
) -> None:
    """Show every cell with its state, rate and result, and the time that is left. Needs no Ray."""
    from rich.console import Console
    from rich.live import Live

    from pipelines.sweep_status import is_at_work, read_status, status_table

    def table() -> tuple[Any, bool]:
        rows, lanes = read_status(workdir)
        return status_table(rows, lanes), lanes is None or is_at_work(lanes)

    console = Console(width=None if sys.stdout.isatty() else 180)
    if not watch:
        console.print(table()[0])
        return
    with Live(console=console, auto_refresh=False) as live:
        is_open = True
        while is_open:
            shown, is_open = table()
            live.update(shown, refresh=True)
            time.sleep(2)


app.command("schedule")(schedule)


@app.command("learning-rate")
def learning_rate(
    workdir: WorkdirOption = Path("jobs/sweep"),
    measured_in: Annotated[str, typer.Option("--measured-in", help="Record that will hold the measurement.")] = "",
) -> None:
    """Fit the ladder's rule of learning rates to a sweep with several `learning_rate_factors`; prints it as YAML."""
    import yaml

    from pipelines.sweep_rates import fit_rates

    found = fit_rates(workdir.resolve(), measured_in or str(workdir))
    for optimum in found.optima:
        sys.stderr.write(
            f"width {optimum.dim}, batch {optimum.batch_size}: {optimum.learning_rate:.3g} and "
            f"{optimum.embedding_learning_rate:.3g}\n"
        )
    sys.stderr.write(f"the rule differs from an optimum by a factor of {found.worst_factor:.2f} at the most\n")
    sys.stdout.write(yaml.safe_dump({"ladder": {"rate": found.rule.model_dump(mode="json")}}, sort_keys=False))


def _plan(
    config: str, workdir: Path, data: Path | None, overrides: list[str] | None, flops_per_s: float | None, verbose: bool
) -> tuple[Any, Any, int]:
    """The plan, the throughput, and how many lanes there is room for."""
    from pipelines import sweep
    from pipelines.console import Console
    from pipelines.experiments.catalog import load_sweep_config
    from pipelines.mlflow_store import quiet_mlflow
    from pipelines.sweep_lanes import find_room
    from pipelines.sweep_plan import throughput_of

    if not verbose:
        quiet_mlflow()
    resolved = load_sweep_config(config, data, overrides or [])
    room = find_room(resolved.lanes, verbose)
    planned = sweep.prepare(resolved, workdir.resolve(), Console(verbose), room)
    return planned, throughput_of(planned, flops_per_s), room.num_lanes


def _show(planned: Any, throughput: Any, num_lanes: int, price: float | None) -> None:
    from rich.console import Console

    from pipelines.sweep_plan import Budget
    from pipelines.sweep_status import plan_summary, plan_table

    Console(width=None if sys.stdout.isatty() else 160).print(plan_table(planned, throughput))
    budget = Budget.of(planned, throughput, num_lanes, price)
    sys.stdout.write(plan_summary(planned, throughput, budget, num_lanes) + "\n")
