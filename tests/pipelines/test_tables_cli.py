"""`userrep tables`: what the commands print and change, on one registry with three versions of a table."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from tests.publishing.matrices import rotated, unit_matrix, write_matrix
from userrep.publishing.release import release

BASE = unit_matrix(200, 8, seed=0)
# MLflow 3.17 maps its tables with a loader that SQLAlchemy 2.1 deprecates, once per process.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with three versions of `users`: the second is `champion`, the third, which is worse, `candidate`."""
    folder = tmp_path_factory.mktemp("tables")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for seed, (alias, value) in enumerate([("champion", 0.5), ("champion", 0.5), ("candidate", 0.2)]):
        write_matrix(folder / f"t{seed}", rotated(BASE, seed)[: 200 - seed], num_evaluated=1000)
        metrics = {"test/recall_at_10": value}
        release(folder / f"t{seed}", "users", alias, tracking_uri=uri, experiment="t", metrics=metrics)
    return uri


def tables(uri: str, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["tables", *arguments, "--tracking-uri", uri], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_versions_are_listed_newest_first(uri: str) -> None:
    head, *rows = tables(uri, "list").splitlines()
    assert head.split() == ["name", "version", "aliases", "rows", "MB", "dim", "dtype", "created", "(UTC)"]
    assert [row.split()[:4] for row in rows] == [
        ["users", "v3", "candidate", "198"],
        ["users", "v2", "champion", "199"],
        ["users", "v1", "-", "200"],
    ]
    assert tables(uri, "list", "users").splitlines() == [head, *rows]


def test_a_version_is_shown_with_what_the_gate_found(uri: str) -> None:
    text = tables(uri, "show", "users@v2")
    assert text.startswith("# User embeddings")
    blocks = [json.loads(block.partition("```")[0]) for block in text.split("```json\n")[1:]]
    assert blocks[0]["facts"]["rows"] == 199
    assert [check["what"] for check in blocks[1]["checks"]][:3] == ["test/recall_at_10", "rows", "ids kept"]
    assert "users version 2, aliases: champion" in text


def test_a_difference_is_counted_and_its_ids_written(uri: str, tmp_path: Path) -> None:
    ids = tmp_path / "ids.parquet"
    lines = tables(uri, "diff", "users@v2", "users@candidate", "--ids", str(ids)).splitlines()
    found = dict(line.split(maxsplit=1) for line in lines if not line.startswith("cosine"))
    assert (found["added"], found["removed"], found["changed"], found["dims"]) == ("0", "1", "198", "8 -> 8")
    assert [line.split()[1] for line in lines if line.startswith("cosine")] == ["0%", "1%", "10%", "50%", "90%", "100%"]
    written = pq.read_table(ids)
    assert written.filter(pq.filters_to_expression([("change", "=", "removed")]))["id"].to_pylist() == ["user-000198"]
    assert [path.name for path in tmp_path.iterdir()] == ["ids.parquet"]


def test_an_alias_is_promoted_with_force_and_rolled_back(uri: str) -> None:
    refused = CliRunner().invoke(app, ["tables", "promote", "users@v3", "--to", "champion", "--tracking-uri", uri])
    assert "test/recall_at_10: 0.5000 -> 0.2000" in str(refused.exception)
    assert "--force" in str(refused.exception)
    forced = tables(uri, "promote", "users@v3", "--to", "champion", "--force")
    assert "FAIL test/recall_at_10" in forced
    assert forced.endswith("users@champion is version 3 (was 2)\n")
    assert "## Forced" in tables(uri, "show", "users@champion")
    assert tables(uri, "rollback", "users@champion") == "users@champion is version 2 (was 3)\n"
    bound = tables(uri, "promote", "users@v3", "--to", "champion", "--set", "max_drop=0.5")
    assert "FAIL" not in bound
    tables(uri, "rollback", "users@champion")


def test_old_versions_are_shown_before_they_are_deleted(uri: str) -> None:
    arguments = ("gc", "users", "--keep-last", "0", "--older-than", "0")
    shown = tables(uri, *arguments)
    assert "would delete" not in shown  # version 1 is where a rollback of champion goes
    assert "a rollback of champion goes there" in shown
    assert shown.endswith("Nothing was deleted: --delete does.\n")
    tables(uri, "rollback", "users@champion")
    tables(uri, "promote", "users@v3", "--to", "champion", "--force")
    assert "would delete users@v2" in tables(uri, *arguments)
    assert "deleted      users@v2" in tables(uri, *arguments, "--delete")
    assert "v2" not in tables(uri, "list")


def test_a_rollback_needs_an_alias(uri: str) -> None:
    result = CliRunner().invoke(app, ["tables", "rollback", "users", "--tracking-uri", uri])
    assert "NAME@ALIAS" in str(result.exception)
