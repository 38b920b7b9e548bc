"""`userrep tables ...`: what is published, how versions differ, which one an alias means. Without torch and ray."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.options import VerboseOption
from pipelines.tables_erase_cli import erase
from userrep.config import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from userrep.publishing.versions import TableVersion

app = typer.Typer(help="Published tables: versions, aliases, differences.", no_args_is_help=True)
app.command("erase")(erase)

ReferenceArgument = Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@v12 or NAME/12.")]
WorkdirOption = Annotated[
    Path, typer.Option("--workdir", "-w", help="Whose database is meant where no MLflow is named.")
]
UriOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow server or database. Default: MLFLOW_TRACKING_URI, else the one of --workdir."
    ),
]


@app.command("list")
def list_(
    name: Annotated[str, typer.Argument(help="One table; default: all.")] = "",
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show names, versions, where the aliases point, rows, size and date."""
    from userrep.publishing.versions import list_tables, list_versions

    uri = _uri(workdir, tracking_uri)
    names = [name] if name else [summary.name for summary in list_tables(tracking_uri=uri, verbose=verbose)]
    rows = [_row(version) for one in names for version in reversed(list_versions(one, tracking_uri=uri))]
    _print_columns([("name", "version", "aliases", "rows", "MB", "dim", "dtype", "created (UTC)"), *rows])


@app.command()
def show(
    reference: ReferenceArgument,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Print the card, the manifest and what the gate found when the version was released; fetches no vector."""
    from userrep.publishing.inspection import inspect
    from userrep.publishing.versions import resolve

    uri = _uri(workdir, tracking_uri)
    version = resolve(reference, tracking_uri=uri, verbose=verbose)
    found = inspect(version, tracking_uri=uri, verbose=verbose)
    sys.stdout.write(f"{found.card}\n## Version\n\n{version.name} version {version.version}, ")
    sys.stdout.write(f"aliases: {', '.join(version.aliases) or 'none'}\n\n```json\n{found.manifest}```\n")
    for heading, text in (("Release", found.report), ("Forced", found.forced)):
        if text:
            sys.stdout.write(f"\n## {heading}\n\n```json\n{text}```\n")


@app.command()
def promote(
    reference: Annotated[str, typer.Argument(help="NAME@v12, NAME/12 or NAME@ALIAS.")],
    to: Annotated[str, typer.Option("--to", help="Alias that is to point there.")],
    force: Annotated[bool, typer.Option("--force", help="Whatever the gate finds; recorded with the version.")] = False,
    bounds: Annotated[
        list[str] | None, typer.Option("--set", "-s", help="A bound of the gate, e.g. min_kept_share=0.9. Repeatable.")
    ] = None,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Point an alias to a version, if the gate finds it no worse than the one that the alias points to now."""
    from userrep.publishing.gate import GateConfig
    from userrep.publishing.release import promote as promote_version
    from userrep.publishing.versions import resolve

    uri = _uri(workdir, tracking_uri)
    gate = GateConfig().with_overrides([*(bounds or []), f"force={str(force).lower()}"])
    version = resolve(reference, tracking_uri=uri, verbose=verbose)
    done = promote_version(version, to, tracking_uri=uri, gate=gate, verbose=verbose)
    for check in done.report.checks if done.report else ():
        sys.stdout.write(f"{'ok  ' if check.is_passed else 'FAIL'} {check.what}: {check.detail}\n")
    before = f"was {done.before}" if done.before else "is new"
    sys.stdout.write(f"{version.name}@{to} is version {version.version} ({before})\n")


@app.command()
def rollback(
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS.")],
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Point an alias to the version that it pointed to before; asks no gate."""
    from userrep.publishing.aliases import rollback as roll_back

    name, mark, alias = reference.partition("@")
    if not name or not mark or not alias:
        raise ConfigError(f"reference {reference!r}: a rollback is of an alias, NAME@ALIAS")
    before, now = roll_back(name, alias, tracking_uri=_uri(workdir, tracking_uri), verbose=verbose)
    sys.stdout.write(f"{name}@{alias} is version {now} (was {before})\n")


@app.command()
def diff(
    old: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@v12, NAME/12, or the directory of a table.")],
    new: Annotated[str, typer.Argument(help="Likewise.")],
    ids: Annotated[Path | None, typer.Option("--ids", help="Parquet file for the ids: `change` and `id`.")] = None,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Count ids that were added, removed and changed from OLD to NEW, and show how far their vectors moved."""
    from userrep.publishing.diff import QUANTILES, diff_tables

    with ExitStack() as stack:
        directories = [stack.enter_context(_table(one, workdir, tracking_uri, verbose)) for one in (old, new)]
        found = diff_tables(directories[0], directories[1], stack.enter_context(_ids_file(ids)) if ids else None)
    for key, value in asdict(found).items():
        if key != "cosine_quantiles":
            sys.stdout.write(f"{key:14} {_text(value)}\n")
    for quantile, value in zip(QUANTILES, found.cosine_quantiles or (), strict=False):
        sys.stdout.write(f"cosine {quantile:>6.0%}  {value:.6f}\n")


@app.command()
def nearest(
    reference: Annotated[str, typer.Argument(help="NAME@ALIAS, NAME@v12, NAME/12, or the directory of a table.")],
    ids: Annotated[list[str], typer.Option("--id", help="A user (or item) of that table. Repeatable.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many for each.")] = 10,
    items: Annotated[
        str | None, typer.Option("--items", help="Table that is searched instead, of the same encoder.")
    ] = None,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Show the rows with the largest cosine to that of an id: exact, of all rows of the table."""
    from userrep.publishing.nearest import nearest_to_ids

    with ExitStack() as stack:
        directory = stack.enter_context(_table(reference, workdir, tracking_uri, verbose))
        among = stack.enter_context(_table(items, workdir, tracking_uri, verbose)) if items else None
        found = nearest_to_ids(directory, ids, k, among=among).to_pylist()
    _print_columns([("of", "nearest", "cosine"), *((one["query"], one["id"], f"{one['cosine']:.6f}") for one in found)])


@app.command()
def gc(
    name: Annotated[str, typer.Argument(help="One table; default: all.")] = "",
    keep_last: Annotated[int, typer.Option("--keep-last", min=0, help="Newest versions that stay.")] = 5,
    older_than_days: Annotated[float, typer.Option("--older-than", min=0, help="Days; younger versions stay.")] = 30.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it, only show them.")] = False,
    workdir: WorkdirOption = Path("jobs"),
    tracking_uri: UriOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Delete the files of old versions that no alias points to, nor would by a rollback. Maps between versions stay."""
    from userrep.publishing.retention import collect, retention_plan
    from userrep.publishing.versions import list_tables

    uri = _uri(workdir, tracking_uri)
    for one in [name] if name else [summary.name for summary in list_tables(tracking_uri=uri, verbose=verbose)]:
        plan = retention_plan(
            one, keep_last=keep_last, older_than_days=older_than_days, tracking_uri=uri, verbose=verbose
        )
        done = collect(plan, tracking_uri=uri, verbose=verbose) if delete else []
        for verdict in plan:
            number = verdict.version.version
            word = "deleted" if number in done else "would delete" if verdict.is_deleted else "keep"
            sys.stdout.write(f"{word:12} {one}@v{number}: {verdict.reason}\n")
    if not delete:
        sys.stdout.write("Nothing was deleted: --delete does.\n")


def _uri(workdir: Path, option: str | None) -> str:
    from pipelines.mlflow_store import tracking_uri

    return tracking_uri(workdir, option)


def _row(version: "TableVersion") -> tuple[str, ...]:
    tags, created = version.tags, datetime.fromtimestamp(version.created_ms / 1000, UTC)
    size = f"{int(tags['size_bytes']) / 1e6:,.1f}" if "size_bytes" in tags else "-"
    return (
        version.name,
        f"v{version.version}",
        ", ".join(version.aliases) or "-",
        f"{int(tags['rows']):,}" if "rows" in tags else "-",
        size,
        tags.get("dim", "-"),
        tags.get("dtype", "-"),
        created.isoformat(sep=" ", timespec="minutes")[:16],
    )


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    for row in rows:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return " -> ".join(map(str, value))
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6f}"


@contextmanager
def _table(reference: str, workdir: Path, tracking_uri: str | None, verbose: bool) -> Iterator[Path]:
    """Directory of a table: one on this machine, verified, or a published version."""
    from userrep.manifest import MANIFEST_NAME
    from userrep.publishing.client import opened
    from userrep.publishing.verify import verify_table
    from userrep.publishing.versions import resolve

    if (Path(reference) / MANIFEST_NAME).is_file():
        verify_table(Path(reference))
        yield Path(reference)
        return
    uri = _uri(workdir, tracking_uri)
    version = resolve(reference, tracking_uri=uri, verbose=verbose)
    with opened(version, tracking_uri=uri, verbose=verbose) as directory:
        yield directory


@contextmanager
def _ids_file(path: Path) -> Iterator["Callable[[str, pa.Array], None]"]:
    """Gives a function that takes ids and what happened to them; the file appears when all have come."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([pa.field("change", pa.string()), pa.field("id", pa.string())])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            yield lambda change, ids: writer.write_table(pa.table([pa.repeat(change, len(ids)), ids], schema=schema))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
