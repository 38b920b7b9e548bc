"""`userrep tables erase` on a working directory and its registry; killed anywhere, the same command finishes."""

import os
import shutil
import stat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines import tables_erase
from pipelines.cli import app
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Draft, Job
from pipelines.mlflow_store import local_tracking_uri
from pipelines.tables_erase import LOG, StillThereError, run, tables_in
from pipelines.tables_erase_cli import wanted_ids
from tests.publishing.conftest import build_table
from tests.support.registry import empty_database
from tests.support.tokenized import User, write_shards
from userrep.config import ConfigError
from userrep.erasure.log import read_log
from userrep.manifest import Manifest, describe_file, read_manifest, verify_files, write_manifest
from userrep.publishing.client import pull, resolve
from userrep.publishing.quality import quality_rows, user_key
from userrep.publishing.registry import publish
from userrep.publishing.table import verify_table

pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")  # as tests/publishing/conftest.py says
USERS = [User(f"user-{n}", "train", {0: [(item, 1) for item in "abc"[: 1 + n % 3]]}) for n in range(40)]


def commit(directory: Path, table: str, facts: dict, inputs: dict[str, str]) -> None:
    files = tuple(describe_file(directory, path) for path in sorted(directory.rglob("*.*")))
    write_manifest(
        directory, Manifest(table=table, stage="x", config={"a": 1}, inputs=inputs, files=files, facts=facts)
    )


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return empty_database(tmp_path_factory.mktemp("empty") / "mlflow.db")


@pytest.fixture
def workdir(tmp_path: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "job"
    root.mkdir()
    shutil.copyfile(database, root / "mlflow.db")
    for table, kind in (("ingest", "shards_text"), ("shards", "shards")):
        facts = write_shards(root / table, [[USERS[:30], USERS[30:]]], has_tokens=kind == "shards")
        facts = [{**fact, "events": sum(len(user.histories[0]) for user in USERS)} for fact in facts]
        inputs = {} if table == "ingest" else {"ingest": read_manifest(root / "ingest").digest()}
        commit(root / table, kind, {"users": 40, "rows": 1, "shards": facts}, inputs)
    (root / "evaluation").mkdir()
    pq.write_table(quality_rows([f"user-{n}" for n in range(5)], {"m": [0.5] * 5}), root / "evaluation/quality.parquet")
    commit(root / "evaluation", "baselines", {}, {"shards": read_manifest(root / "shards").digest()})
    (root / "finetune" / "abc").mkdir(parents=True)
    pq.write_table(pa.table({"user_id": ["user-3", "user-4"], "ndcg": [1.0, 0.0]}), root / "finetune/abc/users.parquet")
    commit(root / "finetune" / "abc", "finetuned_seed", {}, {})
    build_table(root / "embeddings")
    uri = local_tracking_uri(root)
    done = publish(root / "embeddings", "users", "champion", tracking_uri=uri, experiment="t")
    pull("users@champion", root / "pulled", tracking_uri=uri)
    (root / "published").mkdir()
    facts = {"name": "users", "version": 1, "alias": "champion", "sha256": done.table_sha256}
    commit(root / "published", "published", facts, {"embeddings": read_manifest(root / "embeddings").digest()})
    (root / "quarantine").mkdir()
    (root / "quarantine" / "events-00000.jsonl").write_text('{"record": "user-3,a"}\n{"record": "user-4,a"}\n')
    (root / ".shards.staging").mkdir()
    (root / ".shards.staging" / "half").write_text("user-3")
    return root


def check(workdir: Path) -> None:
    """No file but log and key has the id; all tables are whole and current, and the version is the embedded one."""
    for path in workdir.rglob("*"):
        if path.is_file():
            if path.suffix == ".parquet" and "user_id" in pq.read_schema(path).names:
                assert "user-3" not in pq.read_table(path)["user_id"].to_pylist(), path
            if path.suffix != ".db":
                assert b"user-3\n" not in path.read_bytes().replace(b'"', b"\n").replace(b",", b"\n"), path
    keys = pq.read_table(workdir / "evaluation/quality.parquet")["key"].to_pylist()
    assert (len(keys), user_key("user-3") in keys) == (4, False)
    for directory in tables_in(workdir):
        verify_files(directory, read_manifest(directory))
    embedded, pulled = (verify_table(workdir / name) for name in ("embeddings", "pulled"))
    assert embedded == pulled
    version = resolve("users@champion", tracking_uri=local_tracking_uri(workdir))
    sha256 = read_manifest(workdir / "published").facts["sha256"]
    assert version.table_sha256 == embedded.facts["table_sha256"] == sha256
    assert read_manifest(workdir / "shards").facts["users"] == embedded.facts["rows"] == 39
    assert pull("users@champion", workdir / "pulled", tracking_uri=local_tracking_uri(workdir)).manifest == pulled


def test_the_command_erases_proves_and_logs(workdir: Path) -> None:
    (workdir / "ids.txt").write_text("user-3\nsomebody else\n")
    options = ["--users", str(workdir / "ids.txt"), "--workdir", str(workdir)]
    result = CliRunner().invoke(app, ["tables", "erase", *options], catch_exceptions=False)
    assert result.exit_code == 0
    (workdir / "ids.txt").unlink()
    assert "user 'somebody else' was not found\n" in result.stdout
    assert "user 'user-3'" not in result.stdout
    for name in ("ingest", "shards", "embeddings", "pulled", "evaluation", "finetune/abc", "users@v1"):
        assert f"\n{name}: " in "\n" + result.stdout
    assert "none holds any of 2 ids" in result.stdout
    check(workdir)
    assert not (workdir / ".shards.staging").exists()
    assert (workdir / "quarantine" / "events-00000.jsonl").read_text() == '{"record": "user-4,a"}\n'
    records = read_log(workdir / LOG)
    assert [records[0]["event"], records[-1]["event"]] == ["started", "proved"]
    erased = [record for record in records if record["event"] == "erased"]
    assert {record["table"] for record in erased} >= {"shards", "users@v1"}
    assert all(old != new for record in erased for _, old, new in record["files"])
    assert "user-3" not in (workdir / LOG).read_text()
    assert stat.S_IMODE((workdir / "erasure" / "key").stat().st_mode) == 0o600
    again = run(["user-3"], workdir, local_tracking_uri(workdir))
    assert (again.rewritten, again.unknown) == ({}, ())  # the log knows


def test_stages_stay_as_they_are(workdir: Path) -> None:
    run(["user-3"], workdir, local_tracking_uri(workdir))
    job = Job(JobConfig(), workdir, Console())

    def write(draft: Draft) -> None:
        raise AssertionError("the table was made from these things")

    for table, inputs in (("shards", ("ingest",)), ("evaluation", ("shards",)), ("published", ("embeddings",))):
        job.run_stage(table, table, {"a": 1}, inputs, write)
    assert all(report.is_skipped for report in job.reports)


@pytest.mark.parametrize("kill_at", [1, 4, 9])
def test_killed_and_run_again_it_completes(workdir: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    replace, count = os.replace, [0]

    def dying(source: object, target: object) -> None:
        count[0] += 1
        if count[0] == kill_at + 1:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            run(["user-3"], workdir, local_tracking_uri(workdir))
    done = run(["user-3"], workdir, local_tracking_uri(workdir))
    assert (done.unknown, done.scan.found) == ((), ())
    check(workdir)


def test_an_id_that_is_left_is_an_error_that_names_the_file(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workdir / "published" / "notes.md").write_text("asked about user-3 today")
    with pytest.raises(StillThereError, match=r"1 files still hold an erased id, the first is .*notes\.md"):
        run(["user-3"], workdir, local_tracking_uri(workdir))
    assert read_log(workdir / LOG)[-1]["event"] == "failed"


def test_a_directory_without_a_registry(workdir: Path) -> None:
    for name in ("mlartifacts", "published"):
        shutil.rmtree(workdir / name)
    (workdir / "mlflow.db").unlink()
    done = run(["user-3"], workdir, local_tracking_uri(workdir))
    assert "shards" in done.rewritten
    assert not (workdir / "mlflow.db").exists()
    with pytest.raises(ConfigError, match="there is no directory"):
        run(["user-3"], workdir / "none", local_tracking_uri(workdir))


def test_ids_from_both_options(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("b\n\na\n")
    assert wanted_ids(["a"], tmp_path / "ids") == ["a", "b"]
    for users in ([], [""]):
        with pytest.raises(ConfigError, match="give --user ID, or --users FILE"):
            wanted_ids(users, None)
    assert tables_erase.has_registry("http://mlflow.example")
