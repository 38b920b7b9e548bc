"""The recipes of README.md run as they stand there, on a pulled table; those of absent packages are skipped."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.publishing.conftest import build_table
from userrep.publishing.client import PulledTable, TableVersion
from userrep.publishing.verify import verify_table

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README.partition("## Use a table")[2], re.DOTALL)


def run(beginning: str, table: PulledTable) -> dict[str, Any]:
    """What the one block that holds this line has set."""
    (block,) = [block for block in BLOCKS if beginning in block]
    names: dict[str, Any] = {"table": table}
    exec(block, names)
    return names


@pytest.fixture
def table(tmp_path) -> PulledTable:
    build_table(tmp_path / "t", num_users=9)
    manifest = verify_table(tmp_path / "t")
    return PulledTable(tmp_path / "t", manifest, TableVersion("t", 1, (), "", "", "", "", {}, 0))


def test_pandas(table):
    pytest.importorskip("pandas")
    assert sorted(run("# pandas", table)["frame"]["user_id"]) == [f"user-{number}" for number in range(9)]


def test_polars(table):
    pytest.importorskip("polars")
    assert sorted(run("# polars", table)["frame"]["user_id"]) == [f"user-{number}" for number in range(9)]


def test_duckdb(table):
    pytest.importorskip("duckdb")
    assert [one for one, _ in run("# DuckDB", table)["frame"]] == [f"user-{number}" for number in range(9)]


def test_join_and_nearest(table):
    assert run("import join", table)["joined"]["embedding"].null_count == 2
    run("import nearest", table)


def test_vectors(table):
    assert len(run("import float32_vectors", table)["vectors"]) == 9
