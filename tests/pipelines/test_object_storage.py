"""The main job with every path in a bucket, beside the same job on a disk; MLflow keeps its artifacts there too."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.experiments.catalog import load_config
from pipelines.job import Job
from pipelines.run import run, run_stage
from tests.support.mlflow_server import MlflowServer
from tests.support.object_store import SECRET, ObjectStore
from userrep import objects, storage
from userrep.mirror import locate, object_name
from userrep.publishing.client import pull

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    # SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:.*noload.*"),
]

OVERRIDES = [
    "source.num_users=400",
    "source.num_items=300",
    "ingest.num_shards=2",
    "pretrain.num_steps=10",
    "pretrain.validate_every=5",
    "pretrain.optim.bag_steps=2",
    "workers.threads=1",
    "teach.training.max_epochs=1",
    "evaluate.bag_of_tokens_steps=0",
    "evaluate.without_blocks=false",
]
WHAT_IS_MEASURED = ("data", "baselines", "corpus", "tasks")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this node keeps its copies."""
    return tmp_path_factory.mktemp("scratch")


@pytest.fixture(scope="module")
def place(
    _object_store: ObjectStore, node: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, MlflowServer]]:
    """A bucket, and an MLflow server with its artifacts there, named by the environment."""
    uri = _object_store.make_bucket()
    root = tmp_path_factory.mktemp("server")
    with MlflowServer(root, artifacts=f"{uri}/mlflow") as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("USERREP_SCRATCH", str(node))
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield uri, server


@pytest.fixture(scope="module")
def stored(place: tuple[str, MlflowServer]) -> Job:
    """The job as the command line runs it."""
    workdir = f"{place[0]}/jobs/demo"
    words = [word for override in OVERRIDES for word in ("--set", override)]
    done = CliRunner().invoke(app, ["run", "--config", "smoke", "--workdir", workdir, *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return job_in(locate(workdir))


def job_in(workdir: Path, config: JobConfig | None = None) -> Job:
    return Job(config or load_config("smoke", None, OVERRIDES), workdir, Console())


def summary_of(job: Job) -> dict[str, Any]:
    storage.refresh(job.workdir / "summary.json")
    return json.loads((job.workdir / "summary.json").read_text())


def objects_below(job: Job) -> dict[str, Any]:
    name = object_name(job.workdir)
    assert name is not None
    return objects.list_objects(name)


def test_the_result_is_that_of_the_same_job_on_a_disk(
    stored: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    on_disk = job_in(tmp_path)
    run(on_disk)
    expected, found = summary_of(on_disk), summary_of(stored)
    for key in WHAT_IS_MEASURED:
        assert found[key] == expected[key], key
    for key in ("batch_hash", "val_loss", "best_step", "recall_at_10"):
        assert found["pretrain"][key] == expected["pretrain"][key], key
    assert found["table"]["sha256"] == expected["table"]["sha256"]
    assert found["pull"]["verified"] is True
    assert found["pull"]["directory"].startswith("s3://")


def test_another_node_goes_on_with_what_is_in_the_bucket(stored: Job, node: Path) -> None:
    before = summary_of(stored)
    for table in ("embeddings", "pulled"):
        storage.remove(stored.workdir / table)
    shutil.rmtree(node)
    again = job_in(stored.workdir)
    summary = run(again)
    ran = [report.stage for report in again.reports if not report.is_skipped]
    assert ran[0] == "embed"
    assert set(ran) <= {"embed", "publish"}
    assert summary["table"]["sha256"] == before["table"]["sha256"]  # type: ignore[index]
    assert summary["pretrain"] == before["pretrain"]
    names = objects_below(again)
    for table in ("ingest", "shards", "encoder", "taught", "evaluation", "embeddings", "published", "pulled"):
        assert f"{table}/CURRENT" in names
        assert sum(name.startswith(f"{table}/version-") and name.endswith("manifest.json") for name in names) == 1
    assert {"config.json", "summary.json", "report.html"} <= set(names)


def test_mlflow_has_the_table_in_the_bucket_and_gives_it_to_anybody(
    stored: Job, place: tuple[str, MlflowServer], tmp_path: Path
) -> None:
    uri, server = place
    kept = objects.list_objects(uri.removeprefix("s3://") + "/mlflow")
    assert any(name.endswith("part-00000.parquet") for name in kept)
    table = pull("user_embeddings@champion", tmp_path / "users", tracking_uri=server.uri)
    assert table.manifest.facts["table_sha256"] == summary_of(stored)["table"]["sha256"]


def test_credentials_are_nowhere(stored: Job, place: tuple[str, MlflowServer], node: Path) -> None:
    name, server = place[0].removeprefix("s3://"), place[1]
    for key in objects.list_objects(name):
        assert SECRET.encode() not in objects.read_object(f"{name}/{key}"), key
    for path in [*node.rglob("*"), *server.root.rglob("*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_raw_data_are_read_from_the_bucket(place: tuple[str, MlflowServer], tmp_path: Path) -> None:
    uri = place[0]
    raw = locate(f"{uri}/raw")
    raw.mkdir(parents=True)
    events = {"user_id": ["a", "a", "b", "b"], "item_id": ["x", "y", "y", "z"], "pos": [0, 1, 0, 1]}
    pq.write_table(pa.table(events), raw / "events.parquet")
    pq.write_table(pa.table({"item_id": ["x", "y"], "title": ["one", "two"]}), raw / "items.parquet")
    storage.send(raw, "*")
    shutil.rmtree(raw)
    config = load_config("parquet", raw, ["ingest.num_shards=1", "ingest.max_bad_fraction=0.5"])
    job = job_in(locate(f"{uri}/jobs/raw"), config)
    run_stage(job, "ingest")
    assert job.manifest("ingest").facts["users"] == 2
    assert "z" in next((job.path("ingest") / "quarantine").glob("*.jsonl")).read_text()
    shutil.rmtree(raw)
    again = job_in(job.workdir, load_config("parquet", raw, ["ingest.num_shards=1", "ingest.max_bad_fraction=0.5"]))
    run_stage(again, "ingest")
    assert again.reports[0].is_skipped
    # Too many bad records: the table that is there stays, and the records can be read.
    strict = job_in(job.workdir, load_config("parquet", raw, ["ingest.num_shards=1", "ingest.max_bad_fraction=0"]))
    with pytest.raises(ValueError, match=r"reason in s3://.*/quarantine"):
        run_stage(strict, "ingest")
    assert any(name.startswith("quarantine/") for name in objects_below(strict))
    assert job.manifest("ingest").facts["users"] == 2


@pytest.mark.parametrize("command", ["doctor", "ingest"])
def test_what_cannot_work_is_said_at_once(
    command: str, place: tuple[str, MlflowServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def output(workdir: str) -> str:
        options = [] if command == "doctor" else ["--config", "smoke"]
        done = CliRunner().invoke(app, [command, "--workdir", workdir, *options])
        return done.output + str(done.exception)

    assert "there is no bucket nowhere" in output("s3://nowhere/jobs")
    assert "give a path, or s3://BUCKET/KEY" in " ".join(output("gs://bucket/jobs").split())
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "set MLFLOW_TRACKING_URI" in output(f"{place[0]}/jobs/new")


def test_doctor_tries_the_bucket(place: tuple[str, MlflowServer]) -> None:
    done = CliRunner().invoke(app, ["doctor", "--workdir", f"{place[0]}/jobs/demo"])
    assert f"OK    storage: {place[0]}/jobs/demo can be written, read and deleted" in done.output
