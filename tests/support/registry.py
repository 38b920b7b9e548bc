"""Databases of a registry, to be copied: MLflow takes seconds to make one."""

from pathlib import Path

from userrep.publishing.connection import connect


def empty_database(path: Path) -> Path:
    """Makes a database without a table in it."""
    with connect(f"sqlite:///{path}", create=True) as client:
        client.search_experiments()
    return path
