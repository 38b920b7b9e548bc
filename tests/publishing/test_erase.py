"""Users go from tables and from all published versions; numbers and aliases stay; an interrupted erasure goes on."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from tests.publishing.conftest import FACTS, build_table, unit_rows
from tests.support.registry import empty_database
from userrep.erasure.replace import Rewritten, erase_table
from userrep.manifest import describe_file, read_manifest, write_manifest
from userrep.publishing.client import TableMismatchError, pull, resolve
from userrep.publishing.connection import connect
from userrep.publishing.erase import ERASED_TAG, erase_user_table, erase_versions
from userrep.publishing.inputs import INPUTS, inputs_entries, read_inputs, write_inputs
from userrep.publishing.quality import quality_rows, user_key
from userrep.publishing.registry import publish
from userrep.publishing.table import finish_table, verify_table, write_part

IDS = pa.array(["user-3", "nobody"])


def whole_table(directory: Path, dtype: str = "float32") -> None:
    """One part with digests of inputs, quality by user and tasks."""
    directory.mkdir(parents=True)
    ids = [f"user-{n}" for n in range(9)]
    rows = unit_rows(ids, tasks=["gender"])
    finish_table(
        directory,
        parts=[write_part(directory, 0, rows, dtype=dtype)],
        input_files=[write_inputs(directory, 0, pa.table({"user_id": ids, "digest": range(9)}, schema=INPUTS))],
        quality_rows=quality_rows(ids, {"test/mrr": [0.5] * 9}),
        dim=8,
        dtype=dtype,
        tasks=["gender"],
        facts=FACTS,
        config={},
        inputs={},
    )


def erase_all(uri: str, scratch: Path) -> dict[str, Rewritten]:
    done: dict[str, Rewritten] = {}
    erase_versions(
        IDS,
        tracking_uri=uri,
        scratch=scratch,
        on_open=lambda *_: None,
        on_done=lambda version, what: done.update({f"{version.name}@v{version.version}": what}),
    )
    return done


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_all_that_names_a_user_in_a_table(tmp_path: Path, dtype: str) -> None:
    whole_table(tmp_path / "table", dtype)
    before, rows = read_manifest(tmp_path / "table"), pq.read_table(tmp_path / "table" / "part-00000.parquet")
    done = erase_table(tmp_path / "table", IDS, erase_user_table)
    assert done is not None
    after = verify_table(tmp_path / "table")
    kept = rows.filter(pa.array([name != "user-3" for name in rows["user_id"].to_pylist()]))
    assert pq.read_table(tmp_path / "table" / "part-00000.parquet").equals(kept)
    assert read_inputs(tmp_path / "table", 0)["digest"].to_pylist() == [0, 1, 2, 4, 5, 6, 7, 8]
    keys = pq.read_table(tmp_path / "table" / "quality.parquet")["key"].to_pylist()
    assert user_key("user-3") not in keys
    assert len(keys) == len(inputs_entries(after)) * 8 == after.facts["rows"] == 8
    assert (after.facts["erased"], done.num_rows) == (1, 3)
    assert {path for path, _, _ in done.files} == {entry.path for entry in before.files}
    card = (tmp_path / "table" / "card.md").read_text()
    assert f"table sha256 | `{after.facts['table_sha256']}`" in card
    assert "| erased since it was made | 1 |" in card
    assert after.facts.get("quantisation") == before.facts.get("quantisation")


def test_an_index_that_nobody_can_rewrite_goes(tmp_path: Path) -> None:
    whole_table(tmp_path / "table")
    manifest = read_manifest(tmp_path / "table")
    (tmp_path / "table" / "index.faiss").write_text("user-3")
    entry = describe_file(tmp_path / "table", tmp_path / "table" / "index.faiss")
    write_manifest(tmp_path / "table", manifest.model_copy(update={"files": (*manifest.files, entry)}))
    done = erase_table(tmp_path / "table", IDS, erase_user_table)
    assert done is not None
    assert ("index.faiss", entry.sha256, None) in done.files
    assert not (tmp_path / "table" / "index.faiss").exists()
    verify_table(tmp_path / "table")


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty one: its tables take seconds to make."""
    return empty_database(tmp_path_factory.mktemp("empty") / "mlflow.db")


@pytest.fixture
def uri(tmp_path: Path, database: Path) -> str:
    """A registry of its own: an erasure concerns all tables of one."""
    shutil.copyfile(database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    build_table(tmp_path / "one", tasks=["gender"])
    build_table(tmp_path / "two", seed=1)
    build_table(tmp_path / "few", num_users=2)
    for directory, name, alias in (("one", "users", "champion"), ("two", "users", "new"), ("few", "few", "champion")):
        publish(tmp_path / directory, name, alias, tracking_uri=uri, experiment="t", tags={"team": "a"})
    return uri


def check_erased(uri: str, tmp_path: Path) -> None:
    for alias, number in (("champion", 1), ("new", 2)):
        version = resolve(f"users@{alias}", tracking_uri=uri)
        assert (version.version, version.tags["rows"], version.tags["team"]) == (number, "39", "a")
        assert version.tags[ERASED_TAG].startswith("1 user, the last on ")
        pulled = pull(f"users@{alias}", tmp_path / f"pulled {alias}", tracking_uri=uri)
        assert "user-3" not in pulled.dataset().to_table()["user_id"].to_pylist()
        assert pulled.manifest.facts["rows"] == 39
    assert resolve("few@champion", tracking_uri=uri).tags["rows"] == "2"
    assert ERASED_TAG not in resolve("few@champion", tracking_uri=uri).tags


def test_all_versions_lose_the_user_and_keep_number_and_alias(uri: str, tmp_path: Path) -> None:
    before = pull("users@v1", tmp_path / "before", tracking_uri=uri).dataset().to_table().sort_by("user_id")
    done = erase_all(uri, tmp_path / "scratch")
    assert sorted(done) == ["users@v1", "users@v2"]
    check_erased(uri, tmp_path)
    after = pull("users@v1", tmp_path / "after", tracking_uri=uri).dataset().to_table().sort_by("user_id")
    assert after.equals(before.filter(pa.array([name != "user-3" for name in before["user_id"].to_pylist()])))
    assert erase_all(uri, tmp_path / "scratch") == {}
    assert not list((tmp_path / "scratch").iterdir())
    # The same table, erased on disk, is the version that there is.
    erase_table(tmp_path / "one", IDS, erase_user_table)
    assert publish(tmp_path / "one", "users", "champion", tracking_uri=uri, experiment="t").version == 1


STEPS = ["log_model_artifacts", "set_model_version_tag", "update_model_version"]


@pytest.mark.parametrize("step", STEPS)
def test_an_interrupted_erasure_serves_no_torn_version_and_goes_on(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    done_once = getattr(MlflowClient, step)

    def dying(self: MlflowClient, *args: object, **options: object) -> None:
        done_once(self, *args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, dying)
        with pytest.raises(KeyboardInterrupt):
            erase_all(uri, tmp_path / "scratch")
    try:
        found = pull("users@v1", tmp_path / "between", tracking_uri=uri).manifest.facts["rows"]
    except TableMismatchError:
        pass
    else:
        assert found == 39
    assert sorted(erase_all(uri, tmp_path / "scratch")) == ["users@v1", "users@v2"]
    check_erased(uri, tmp_path)


def test_files_of_an_interrupted_publish_are_deleted(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_table(tmp_path / "third", seed=2)

    def dying(self: MlflowClient, *args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "create_model_version", dying)
        with pytest.raises(KeyboardInterrupt):
            publish(tmp_path / "third", "users", "champion", tracking_uri=uri, experiment="t")
    files = list((tmp_path / "mlartifacts").rglob("part-*.parquet"))
    erase_all(uri, tmp_path / "scratch")
    left = list((tmp_path / "mlartifacts").rglob("part-*.parquet"))
    assert len(left) == len(files) - 3
    for path in left:
        assert "user-3" not in pq.read_table(path)["user_id"].to_pylist()
    with connect(uri) as client:
        assert len(client.search_model_versions("name='users'")) == 2
    assert publish(tmp_path / "third", "users", "champion", tracking_uri=uri, experiment="t").version == 3
