"""The bare install (pyarrow + mlflow-skinny) against a real MLflow server; what it cannot do is explained."""

import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.publishing.conftest import left_in
from userrep.publishing.client import TableMismatchError, pull, resolve
from userrep.publishing.connection import UnknownTableError, UnknownVersionError
from userrep.publishing.registry import publish

ROOT = Path(__file__).parents[2]
# Hides packages as if they were not installed, then runs a script.
WITHOUT = """
import importlib.machinery, sys
class Hidden(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Hidden
{script}
"""
HEAVY = ("torch", "ray", "numpy", "pandas", "sqlalchemy", "alembic", "transformers", "sklearn")


def run_without(blocked: tuple[str, ...], script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", WITHOUT.format(blocked=blocked, script=script)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_the_client_imports_without_torch_ray_numpy_and_databases():
    done = run_without(HEAVY, "import userrep.publishing.client, userrep.publishing.registry; print('imported')")
    assert (done.stdout, done.returncode) == ("imported\n", 0), done.stderr


def test_a_database_on_a_bare_install_is_explained(tmp_path):
    call = f"list_tables(tracking_uri='sqlite:///{tmp_path}/x.db')"
    done = run_without(HEAVY, f"from userrep.publishing.client import list_tables\n{call}")
    assert "which this bare install cannot open: use the http:// address" in done.stderr


def test_what_needs_numpy_says_how_to_get_it(table_dir):
    script = f"""
import sys
from pipelines.cli import main
sys.argv = ["userrep", "tables", "diff", {str(table_dir)!r}, {str(table_dir)!r}]
main()"""
    done = run_without(HEAVY, script)
    assert (done.stderr, done.returncode) == ("userrep: this command needs numpy: pip install 'userrep[tables]'\n", 1)


@pytest.mark.slow
def test_a_bare_install_publishes_to_and_pulls_from_a_server(table_dir, tmp_path, server_uri):
    script = f"""
from pathlib import Path
from userrep.publishing.client import list_tables, pull
from userrep.publishing.registry import publish
table_dir, copy = Path({str(table_dir)!r}), Path({str(tmp_path / "copy")!r})
uri = {server_uri!r}
done = publish(table_dir, "users", "champion", tracking_uri=uri, experiment="t", metrics={{"val/mrr": 0.5}})
pulled = pull("users@champion", copy, tracking_uri=uri)
assert pulled.dataset().count_rows() == 40
print(done.version, [table.name for table in list_tables(tracking_uri=uri)])
"""
    done = run_without(HEAVY, script)
    assert (done.stdout, done.stderr, done.returncode) == ("1 ['users']\n", "", 0)
    for path in table_dir.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_a_server_behaves_as_a_database_does(table_dir, tmp_path, tmp_path_factory, server_uri):
    done = publish(table_dir, "served", "champion", tracking_uri=server_uri, experiment="t", metrics={"val/mrr": 0.5})
    again = publish(table_dir, "served", "second", tracking_uri=server_uri, experiment="t")
    client = MlflowClient(tracking_uri=server_uri, registry_uri=server_uri)
    assert (done.version, again.version, again.model_id) == (1, 1, done.model_id)
    assert client.get_model_version("served", "1").source == f"models:/{done.model_id}"
    assert [metric.value for metric in client.get_logged_model(done.model_id).metrics] == [0.5]
    with pytest.raises(UnknownVersionError, match=r"@champion \(v1\), @second \(v1\)"):
        resolve("served@third", tracking_uri=server_uri)
    with pytest.raises(UnknownTableError, match=r"did you mean .*served"):
        resolve("serves@third", tracking_uri=server_uri)
    part = next(tmp_path_factory.getbasetemp().rglob(f"server*/files/**/{done.model_id}/artifacts/part-00001.parquet"))
    part.unlink()
    with pytest.raises(TableMismatchError, match=r"part-00001\.parquet is missing"):
        pull("served@champion", tmp_path / "copy", tracking_uri=server_uri)
    assert left_in(tmp_path) == ["built"]
