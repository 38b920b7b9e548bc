"""`userrep tables erase`; the library is imported when it runs, so that other commands start without numpy."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipelines.options import VerboseOption
from userrep.config import ConfigError


def erase(
    user: Annotated[list[str] | None, typer.Option("--user", help="Id of a user. Repeatable.")] = None,
    users: Annotated[Path | None, typer.Option("--users", help="File with an id on each line.")] = None,
    workdir: Annotated[
        Path, typer.Option("--workdir", "-w", help="Its shards and tables; the erasure log is kept there.")
    ] = Path("jobs"),
    tracking_uri: Annotated[
        str | None,
        typer.Option(
            "--tracking-uri", help="MLflow server or database. Default: MLFLOW_TRACKING_URI, else the one of --workdir."
        ),
    ] = None,
    verbose: VerboseOption = False,
) -> None:
    """Remove users from shards, tables and all published versions, prove it by a scan, and log it without their ids."""
    from pipelines.mlflow_store import quiet_mlflow
    from pipelines.mlflow_store import tracking_uri as choose_uri
    from pipelines.tables_erase import LOG, run

    ids = wanted_ids(user or [], users)
    if not verbose:
        quiet_mlflow()
    done = run(ids, workdir.resolve(), choose_uri(workdir, tracking_uri), verbose=verbose)
    for name, what in done.rewritten.items():
        sys.stdout.write(f"{name}: {what.num_rows:,} rows erased, {len(what.files)} files rewritten\n")
    for one in done.unknown:
        sys.stdout.write(f"user {one!r} was not found\n")
    sys.stdout.write(
        f"{done.scan.num_files:,} files searched, the bytes of {done.scan.num_raw:,} of them too: none holds any of "
        f"{len(ids)} ids. Log: {workdir / LOG}\n"
        "Out of reach: the source (an ingest brings them back), weights of encoders, and what others have pulled.\n"
    )


def wanted_ids(users: Sequence[str], file: Path | None) -> list[str]:
    """Ids from both options, each once.

    Raises:
        ConfigError: there is none.
    """
    lines = file.read_text(encoding="utf-8").splitlines() if file else []
    ids = list(dict.fromkeys([*users, *(line for line in lines if line)]))
    if not ids or "" in ids:
        raise ConfigError("received no user, or one with an empty id: give --user ID, or --users FILE with one a line")
    return ids
