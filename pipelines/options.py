"""Options that commands share."""

from pathlib import Path
from typing import Annotated

import typer

DataOption = Annotated[
    Path | None, typer.Option("--data", "-d", help="Path of the raw data, for sources that read files.")
]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's and MLflow's own messages.")]
