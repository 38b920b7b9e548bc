"""Options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

from userrep.config import ConfigError
from userrep.mirror import locate, object_name


def any_path(text: str | Path) -> Path:
    """A path as it was written, or the mirror of `s3://BUCKET/KEY`; typer passes a default as it is."""
    try:
        return locate(text) if ":/" in str(text) else Path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def local_path(text: str | Path) -> Path:
    """A path of commands that do not work in object storage."""
    if object_name(any_path(text)) is not None:
        raise typer.BadParameter("this command works on a local or shared disk: give a path, or mount the bucket")
    return Path(text)


DataOption = Annotated[
    Path | None,
    typer.Option("--data", "-d", parser=any_path, help="Path or s3:// of the raw data, for sources that read files."),
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's and MLflow's own messages.")]
InsecureOption = Annotated[
    bool,
    typer.Option("--insecure", help="Speak plain http to the job server of another machine; see cluster/README.md."),
]
LocalWorkdirOption = Annotated[
    Path,
    typer.Option("--workdir", "-w", parser=local_path, help="Where everything goes. Rerunning continues there."),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="Override, e.g. pretrain.num_steps=500. Repeatable.")
]
UriOption = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri", help="MLflow server or database. Default: MLFLOW_TRACKING_URI, else the one of --workdir."
    ),
]
