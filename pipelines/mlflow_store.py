"""Which MLflow a job talks to: the one that MLFLOW_TRACKING_URI names, else a database in the working directory."""

import logging
import os
from pathlib import Path

from userrep.config import ConfigError
from userrep.mirror import object_name, shown


def tracking_uri(workdir: Path, option: str | None = None) -> str:
    """Tracking and registry URI; absolute, because Ray workers change their directory.

    Args:
        workdir: of the job.
        option: what the command line says, which comes first.
    """
    return option or os.environ.get("MLFLOW_TRACKING_URI") or local_tracking_uri(workdir)


def local_tracking_uri(workdir: Path) -> str:
    """URI of the SQLite database of a working directory.

    Raises:
        ConfigError: it is in object storage, which holds no database.
    """
    if object_name(workdir) is not None:
        raise ConfigError(
            f"{shown(workdir)} is in object storage, which holds no MLflow database: set MLFLOW_TRACKING_URI"
        )
    return f"sqlite:///{workdir.resolve() / 'mlflow.db'}"


def artifact_root(workdir: Path) -> Path | None:
    """Where the database of the working directory keeps artifacts; None leaves that to the MLflow that is named."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else workdir.resolve() / "mlartifacts"


def quiet_mlflow() -> None:
    """Hides migration logs of the local database."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
