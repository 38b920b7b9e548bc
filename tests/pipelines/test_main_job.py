"""The whole job on a small synthetic world: all stages, twice; training on one worker, on two, and resumed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.dataset
import pytest
import torch

from pipelines import tokenize
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.experiments.catalog import load_config
from pipelines.job import Job
from pipelines.mlflow_store import artifact_root, local_tracking_uri
from pipelines.pretrain import training_curve
from pipelines.run import STAGES, run
from pipelines.teach import CLASSES_NAME
from userrep.data.views import read_row_group
from userrep.manifest import read_manifest
from userrep.task_vectors import TaskVectors
from userrep.training.checkpoint import CHECKPOINTS, MODEL_FILE, checkpoint_step, list_checkpoints, load_encoder
from userrep.training.launch import train
from userrep.training.settings import WorkersConfig
from userrep.training.tracking import SPOOL_NAME

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    # SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:.*noload.*"),
]

SMOKE = load_config("smoke", None, ["source.num_users=800", "source.num_items=500", "pretrain.optim.bag_steps=4"])


@pytest.fixture(scope="module")
def finished(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(SMOKE, tmp_path_factory.mktemp("job"), Console())
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(job)
    return job


def summary_of(job: Job) -> dict:
    return json.loads((job.workdir / "summary.json").read_text())


def test_summary_has_what_users_rely_on(finished: Job) -> None:
    summary = summary_of(finished)
    assert set(summary["stages"]) == set(STAGES)
    for stage in summary["stages"].values():
        assert stage["seconds"] > 0
        assert stage["rows"] > 0
        assert stage["skipped"] is False
    assert summary["peak_rss_bytes"] > summary["driver_peak_rss_bytes"] > 0
    assert summary["pretrain"]["steps"] == 20
    assert summary["pretrain"]["samples_seen"] == 20 * SMOKE.pretrain.global_batch_size
    for key in ("users_per_s", "val_loss", "recall_at_1", "recall_at_10", "pool"):
        assert summary["pretrain"][key] > 0, key
    assert 0 <= summary["pretrain"]["input_wait_fraction"] < 1
    for name in ("random", "popularity", "tfidf", "bag_of_tokens", "without_blocks", "oracle"):
        assert 0 <= summary["baselines"][name]["recall_at_10"] <= 1
    assert summary["baselines"]["oracle"]["recall_at_10"] > summary["baselines"]["tfidf"]["recall_at_10"]
    assert summary["table"]["rows"] == summary["data"]["users"] == 800
    assert summary["table"]["version"] == 1
    assert summary["pull"]["verified"] is True
    assert (finished.workdir / "report.html").stat().st_size > 10_000


def test_pulled_table_equals_the_embedded_one(finished: Job) -> None:
    embedded, pulled = (
        pyarrow.dataset.dataset(sorted(finished.path(name).glob("part-*.parquet")), format="parquet").to_table()
        for name in ("embeddings", "pulled")
    )
    assert pulled.equals(embedded)
    assert len(set(pulled["user_id"].to_pylist())) == pulled.num_rows == 800


def test_every_task_has_a_column_under_its_mask(finished: Job) -> None:
    tasks = summary_of(finished)["tasks"]
    assert tasks["order"] == ["universal", "shop", "gender"]
    assert tasks["metrics"] == ["recall_at_10", "mrr_at_5", "accuracy"]
    for j, row in enumerate(tasks["matrix"]):
        assert [score is not None for score in row] == [True] * (j + 1) + [False] * (2 - j)
    table = pyarrow.dataset.dataset(sorted(finished.path("pulled").glob("part-*.parquet")), format="parquet").to_table()
    assert table.schema.names[-2:] == ["embedding_shop", "embedding_gender"]
    # Vectors of one row group alone are those of the table, which was encoded shard by shard.
    taught = TaskVectors(finished.path("taught"))
    encoder = load_encoder(finished.path("taught"))
    rows = {row["user_id"]: row for row in table.to_pylist()}
    group = read_row_group(finished.path("shards"), 1, 0)
    vectors = taught.encode(encoder, group)
    classes = json.loads((finished.path("taught") / CLASSES_NAME).read_text())
    assert {name: len(names) for name, names in classes.items()}.keys() == {"shop", "gender"}
    assert not np.allclose(vectors["shop"], vectors["gender"], atol=1e-3)
    for name, vectors_ND in vectors.items():
        published = np.array([rows[user_id][f"embedding_{name}"] for user_id in group.user_ids.to_pylist()])
        np.testing.assert_allclose(published, vectors_ND, atol=1e-5)
    assert not np.allclose(
        load_encoder(finished.path("encoder")).user_encoder.head_out.weight.detach(),
        encoder.user_encoder.head_out.weight.detach(),
    )
    assert torch.equal(load_encoder(finished.path("encoder")).token_embedding.weight, encoder.token_embedding.weight)


def test_rerun_skips_every_stage_and_changes_nothing(finished: Job) -> None:
    before = summary_of(finished)
    again = Job(SMOKE, finished.workdir, Console())
    run(again)
    after = summary_of(again)
    assert all(stage["skipped"] for stage in after["stages"].values())
    assert after["table"] == before["table"]
    assert after["pretrain"] == before["pretrain"]
    assert {name: stage["rows"] for name, stage in after["stages"].items()} == {
        name: stage["rows"] for name, stage in before["stages"].items()
    }


def test_downstream_pulls_without_torch_and_ray(finished: Job, tmp_path: Path) -> None:
    blocked = "import sys; sys.modules.update(torch=None, ray=None); from pipelines.cli import main; main()"
    command = ["pull", "user_embeddings@champion", "--to", str(tmp_path / "users")]
    uri = ["--tracking-uri", local_tracking_uri(finished.workdir)]
    done = subprocess.run([sys.executable, "-c", blocked, *command, *uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows"] == 800
    assert read_manifest(tmp_path / "users").facts == read_manifest(finished.path("embeddings")).facts


def test_a_named_mlflow_keeps_its_own_artifacts(finished: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert artifact_root(finished.workdir) == finished.workdir / "mlartifacts"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example:5000")
    assert artifact_root(finished.workdir) is None


def run_training(finished: Job, run_dir: Path, config: JobConfig, num_workers: int) -> list[dict]:
    run_dir.mkdir(exist_ok=True)
    train(finished.path(tokenize.TABLE), run_dir, config.pretrain, WorkersConfig(num_workers=num_workers, threads=1))
    return training_curve(run_dir / SPOOL_NAME)


def test_two_workers_and_an_interrupted_run_train_the_same_model(finished: Job, tmp_path: Path) -> None:
    one = run_training(finished, tmp_path / "one", SMOKE, num_workers=1)
    two = run_training(finished, tmp_path / "two", SMOKE, num_workers=2)
    assert len(one) == len(two) == 20
    assert two[-1]["metrics"]["val/loss"] == pytest.approx(one[-1]["metrics"]["val/loss"], rel=1e-4)
    for point, other in zip(one, two, strict=True):
        assert other["metrics"]["train/loss"] == pytest.approx(point["metrics"]["train/loss"], rel=1e-4)
    checkpoints = {name: list_checkpoints(tmp_path / name / CHECKPOINTS) for name in ("one", "two")}
    states = {name: read_manifest(paths[-1]).facts for name, paths in checkpoints.items()}
    assert states["one"]["batch_hash"] == states["two"]["batch_hash"]  # the same users in the same global batches

    # A run that stopped after step 10 goes on from there, bit for bit.
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "one", resumed, ignore=shutil.ignore_patterns("ray", SPOOL_NAME))
    for checkpoint in list_checkpoints(resumed / CHECKPOINTS):
        if checkpoint_step(checkpoint) > 10:
            shutil.rmtree(checkpoint)
    curve = run_training(finished, resumed, SMOKE, num_workers=1)
    assert [point["step"] for point in curve] == list(range(11, 21))
    final = list_checkpoints(resumed / CHECKPOINTS)[-1]
    assert (final / MODEL_FILE).read_bytes() == (checkpoints["one"][-1] / MODEL_FILE).read_bytes()
    assert read_manifest(final).facts["batch_hash"] == states["one"]["batch_hash"]
