"""Options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    Path | None, typer.Option("--data", "-d", help="Path of the raw data, for sources that read files.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's and MLflow's own messages.")]
InsecureOption = Annotated[
    bool,
    typer.Option("--insecure", help="Speak plain http to the job server of another machine; see cluster/README.md."),
]
