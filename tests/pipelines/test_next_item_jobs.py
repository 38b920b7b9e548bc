"""Recformer and the two-tower model through every stage; what they publish, and what they refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from pipelines import embed, evaluate, ingest, pretrain, tokenize
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.experiments.catalog import load_config
from pipelines.job import Job
from pipelines.mlflow_store import local_tracking_uri
from pipelines.run import run
from tests.support.distributed import run_ranks
from userrep.config import ConfigError
from userrep.publishing.client import pull
from userrep.publishing.entity import ITEM
from userrep.training.encoders import open_encoder
from userrep.training.encoding import MemoryConfig
from userrep.training.settings import CluePretraining, TwoTowerPretraining, open_training_stream
from userrep.training.state import train_step
from userrep.training.systems import build_state, open_system, parse_pretraining

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_cluster"),
    # SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
    pytest.mark.filterwarnings("ignore:.*noload.*"),
]
SYSTEMS = ["recformer", "two_tower"]


@pytest.fixture(scope="module")
def ingested(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both systems are trained on."""
    job = Job(load_config("recformer_smoke", None, []), tmp_path_factory.mktemp("ingested"), Console())
    ingest.run(job)
    return job.path(ingest.TABLE)


@pytest.fixture(scope="module", params=SYSTEMS)
def finished(request: pytest.FixtureRequest, ingested: Path, tmp_path_factory: pytest.TempPathFactory) -> Job:
    job = Job(load_config(f"{request.param}_smoke", None, []), tmp_path_factory.mktemp(request.param), Console())
    shutil.copytree(ingested, job.path(ingest.TABLE))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        run(job)
    return job


def test_a_job_measures_the_encoder_against_what_needs_no_training(finished: Job) -> None:
    summary = json.loads((finished.workdir / "summary.json").read_text())
    assert set(summary["baselines"]) == {"random", "popularity", "tfidf", "oracle"}
    assert summary["pretrain"]["views"].startswith("the last item of a user's history")
    assert 0 <= summary["pretrain"]["recall_at_10"] <= 1
    assert summary["pull"]["verified"] is True
    assert (finished.workdir / "report.html").stat().st_size > 10_000
    is_two_tower = isinstance(finished.config.pretrain, TwoTowerPretraining)
    assert ("all" in summary["corpus"]) == is_two_tower
    curve = finished.manifest(pretrain.TABLE).facts["curve"]
    assert curve[-1]["metrics"]["train/loss"] < curve[0]["metrics"]["train/loss"]


def test_items_are_published_beside_users_and_compare_with_them(finished: Job, tmp_path: Path) -> None:
    table = pull(
        f"{embed.item_table_name(finished)}@champion",
        tmp_path / "items",
        tracking_uri=local_tracking_uri(finished.workdir),
    )
    assert table.entity == ITEM
    rows = table.dataset().to_table()
    assert rows.num_rows == finished.manifest("ingest").facts["counts"]["items"]["records"]
    encoder = open_encoder(finished.path(pretrain.TABLE))
    vectors = np.stack(rows["embedding"].to_numpy())
    assert vectors.shape[1] == encoder.dim == finished.manifest(embed.TABLE).facts["dim"]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_finished_job_is_not_run_again(finished: Job) -> None:
    again = Job(finished.config, finished.workdir, Console())
    embed.run(again)
    evaluate.run(again)
    assert [report.is_skipped for report in again.reports] == [True, True, True]


def losses_of(rank_: int, world: int, values: dict[str, Any], shards: str) -> list[float]:
    """Losses of all steps of a run, by one of several processes, without Ray."""
    config = parse_pretraining(values)
    system, state = open_system(config, Path(shards)), build_state(config, Path(shards))
    objective: torch.nn.Module = system.build_objective(state.model, MemoryConfig())
    if world > 1:
        objective = DistributedDataParallel(objective)
    batches = open_training_stream(Path(shards), config).batches(0, rank_, world)
    return [train_step(objective, state, b, config.optim, config.num_steps)["train/loss"] for b in batches]


def test_two_workers_learn_what_one_learns(finished: Job) -> None:
    arguments = finished.config.pretrain.model_dump(mode="json"), str(finished.path(tokenize.TABLE))
    (alone,) = run_ranks(losses_of, 1, 1, *arguments)
    first, second = run_ranks(losses_of, 2, 2, *arguments)
    assert len(alone) == 20
    assert first == second
    np.testing.assert_allclose(first, alone, rtol=1e-4)
    reported = [point["metrics"]["train/loss"] for point in finished.manifest(pretrain.TABLE).facts["curve"]]
    np.testing.assert_allclose(reported, alone, rtol=1e-4)


@pytest.mark.parametrize("system", SYSTEMS)
def test_shards_without_what_a_system_reads_are_refused(system: str, finished: Job) -> None:
    theirs = load_config(f"{system}_smoke", None, []).pretrain
    if theirs.system == finished.config.pretrain.system:
        assert open_system(theirs, finished.path(tokenize.TABLE)).build_model() is not None
    else:
        wanted = "tokenize.attributes" if system == "recformer" else "tokenize.features"
        with pytest.raises(ConfigError, match=wanted):
            open_system(theirs, finished.path(tokenize.TABLE))


def test_clue_refuses_tokens_of_keys(finished: Job) -> None:
    shards = finished.path(tokenize.TABLE)
    if finished.config.tokenize.attributes is None:
        assert open_system(CluePretraining(), shards).build_model() is not None
    else:
        with pytest.raises(ConfigError, match=r"tokenize\.attributes=null"):
            open_system(CluePretraining(), shards)


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_for_clue_alone_says_so(system: str) -> None:
    config = load_config(f"{system}_smoke", None, [])
    with pytest.raises(ConfigError, match=r"pretrain\.system=clue"):
        _ = config.clue
    with pytest.raises(ConfigError, match=r"pretrain\.system=clue"):
        config.with_overrides(["teach.questions=[{kind: item, service: shop}]"])
    with pytest.raises(ConfigError, match=r"learns from \[next_item\] alone"):
        config.with_overrides(["pretrain.views.kinds=[time]"])
    assert JobConfig.parse(config.model_dump(mode="json")) == config
