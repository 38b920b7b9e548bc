"""A table by its directory or by its reference in the registry."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.mlflow_store import tracking_uri
from userrep.config import ConfigError
from userrep.manifest import MANIFEST_NAME
from userrep.publishing.client import opened
from userrep.publishing.verify import verify_table
from userrep.publishing.versions import REFERENCE, resolve


@contextmanager
def table_directory(table: str, workdir: Path, is_verbose: bool) -> Iterator[Path]:
    """Gives the directory of a verified embedding table while the block runs.

    Args:
        table: its directory, as given or below the working directory, or NAME@ALIAS, NAME@v12 or NAME/12.
        workdir: whose database is meant where no MLflow is named; a version that lies elsewhere is pulled into it,
            where all nodes of a cluster see it.
        is_verbose: let MLflow log.

    Raises:
        ConfigError: neither a table nor a reference.
        IncompleteTableError: the table is damaged.
        RegistryError: there is no such version.
    """
    for directory in (Path(table), workdir / table):
        if (directory / MANIFEST_NAME).is_file():
            verify_table(directory)
            yield directory.resolve()
            return
    if not REFERENCE.fullmatch(table):
        raise ConfigError(f"--since {table!r}: there is no table of this name; give its directory, or NAME@ALIAS")
    uri = tracking_uri(workdir)
    version = resolve(table, tracking_uri=uri, verbose=is_verbose)
    with opened(version, tracking_uri=uri, scratch=workdir, verbose=is_verbose) as directory:
        yield directory
