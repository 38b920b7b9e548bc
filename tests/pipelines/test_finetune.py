"""The stage in its smallest form: what it leaves, what it skips, what it refuses, and the command."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from pipelines import finetune as stage
from pipelines import tokenize
from pipelines.cli import app
from pipelines.job import Job
from tests.support.recformer_job import make_job, write_recformer
from userrep.config import ConfigError
from userrep.data.leave_one_out import load_leave_one_out
from userrep.data.tokenizer import TOKENIZER_NAME, TokenizerMismatchError
from userrep.evaluation.next_item_ranking import METRICS
from userrep.manifest import read_manifest, verify_files
from userrep.training.checkpoint import MODEL_FILE
from userrep.training.finetune import FinetuneConfig, StageConfig, open_reader
from userrep.training.finetune_evaluation import encode_items, evaluate
from userrep.training.recformer_table import load_recformer

CONFIG = FinetuneConfig(
    moving=StageConfig(max_epochs=2, patience=2),
    frozen=StageConfig(max_epochs=1, patience=1),
    batch_size=8,
    learning_rate=1e-2,
    min_steps=1,
)


class Made(NamedTuple):
    job: Job
    encoder: Path


@pytest.fixture
def made(tmp_path: Path) -> Made:
    job = make_job(tmp_path / "job")
    write_recformer(tmp_path / "encoder", job)
    return Made(job, tmp_path / "encoder")


def of_table(job: Job, seed: int, encoder: Path, config: FinetuneConfig) -> dict[str, np.ndarray]:
    """Test metrics of every asked user, with the weights and the matrix of a finished table."""
    directory = job.path(stage.TABLE) / f"seed-{seed}"
    model, vocabulary = load_recformer(encoder)
    model.load_state_dict(load_file(directory / MODEL_FILE))
    shards = job.path(tokenize.TABLE)
    data = load_leave_one_out(shards, job.manifest(tokenize.TABLE).facts["shards"])
    items = pq.read_table(job.path(stage.TABLE) / stage.ITEMS_FILE)["item_id"]
    assert items.to_pylist() == data.item_ids.to_pylist()
    item_ID = load_file(directory / stage.ITEM_MATRIX_FILE)["items"]
    return evaluate(model, item_ID, open_reader(data, model.config, vocabulary.cls_id, config), "test")


def test_table_holds_models_matrices_and_what_they_score(made: Made) -> None:
    facts = stage.run(made.job, made.encoder, CONFIG, (3, 5))
    verify_files(made.job.path(stage.TABLE), made.job.manifest(stage.TABLE))
    means = []
    for seed in (3, 5):
        values = of_table(made.job, seed, made.encoder, CONFIG)
        users = pq.read_table(made.job.path(stage.TABLE) / f"seed-{seed}" / stage.USERS_FILE)
        assert len(users) == facts["rows"] < facts["users"]
        for metric in METRICS:
            np.testing.assert_allclose(users[metric].to_numpy(), values[metric], rtol=0, atol=1e-9)
        means.append(values["mrr"].mean())
        assert facts["seeds"][str(seed)]["test"]["all"]["mrr"]["mean"] == pytest.approx(means[-1], abs=1e-9)
        assert [epoch["stage"] for epoch in facts["seeds"][str(seed)]["epochs"]][:2] == ["pretrained", "moving"]
    mrr = facts["test"]["all"]["mrr"]
    assert mrr["mean"] == pytest.approx(np.mean(means), abs=1e-9)
    assert mrr["low"] <= mrr["mean"] <= mrr["high"]
    assert facts["test"]["in_set"]["num_users"] + facts["test"]["cold"]["num_users"] == facts["rows"]


def test_what_is_finished_is_not_trained_again(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.run(made.job, made.encoder, CONFIG, (0,))
    first = made.job.manifest(stage.TABLE)
    seeds, original = [], stage.finetune

    def spy(model: object, reader: object, config: FinetuneConfig, *rest: object) -> object:
        seeds.append(config.seed)
        if config.seed == 2:
            raise RuntimeError("killed")
        return original(model, reader, config, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(stage, "finetune", spy)
    stage.run(made.job, made.encoder, CONFIG, (0,))
    assert made.job.reports[-1].is_skipped
    with pytest.raises(RuntimeError, match="killed"):
        stage.run(made.job, made.encoder, CONFIG, (0, 1, 2))
    assert seeds == [1, 2]
    assert made.job.manifest(stage.TABLE) == first
    monkeypatch.setattr(stage, "finetune", original)
    facts = stage.run(made.job, made.encoder, CONFIG, (0, 1, 2))
    assert list(facts["seeds"]) == ["0", "1", "2"]
    assert facts["seeds"]["0"] == first.facts["seeds"]["0"]


def test_zero_shot_is_the_evaluation_of_the_loaded_encoder(made: Made) -> None:
    config = CONFIG.model_copy(update={"moving": None, "frozen": None})
    facts = stage.run(made.job, made.encoder, config, (7, 8), table="zero_shot")
    model, vocabulary = load_recformer(made.encoder)
    shards = made.job.path(tokenize.TABLE)
    data = load_leave_one_out(shards, made.job.manifest(tokenize.TABLE).facts["shards"])
    reader = open_reader(data, model.config, vocabulary.cls_id, config)
    values = evaluate(model, encode_items(model, reader), reader, "test")
    assert facts["test"]["all"]["num_users"] == len(data.asked)
    for metric in METRICS:
        assert facts["test"]["all"][metric] == {
            "mean": pytest.approx(values[metric].mean(), abs=1e-9),
            "low": None,
            "high": None,
        }
    state = load_file(made.job.path("zero_shot") / "seed-0" / MODEL_FILE)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_other_tokens_are_refused_with_what_to_do(made: Made, tmp_path: Path) -> None:
    other = make_job(tmp_path / "other", max_tokens=31)
    with pytest.raises(TokenizerMismatchError, match=rf"--set tokenize.name={made.encoder / TOKENIZER_NAME}") as error:
        stage.run(other, made.encoder, CONFIG)
    assert '"max_attribute_tokens": 8' in str(error.value)
    plain = make_job(tmp_path / "plain", has_keys=False)
    with pytest.raises(ConfigError, match=r"source\.keep_attributes=true"):
        stage.run(plain, made.encoder, CONFIG)
    same = make_job(tmp_path / "same", tokenizer=str(made.encoder / TOKENIZER_NAME))
    stage.check_inputs(same, made.encoder)
    with pytest.raises(ConfigError, match="at least one"):
        stage.run(made.job, made.encoder, CONFIG, ())


def run_command(made: Made, *arguments: str) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    words = ["finetune", "--from", str(made.encoder), "--workdir", str(made.job.workdir), "--config", "smoke"]
    result = CliRunner().invoke(app, [*words, *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_command_resolves_its_options_and_runs(made: Made) -> None:
    options = ["--set", "finetune.moving.max_epochs=1", "--set", "finetune.frozen=null", "--set", "workers.threads=1"]
    options += ["--seeds", "1,2", "--share", "0.5"]
    shown = run_command(made, *options, "--dry-run")
    assert shown["seeds"] == [1, 2]
    assert shown["finetune"]["share"] == 0.5
    assert shown["finetune"]["moving"]["max_epochs"] == 1
    assert shown["finetune"]["frozen"] is None
    assert not made.job.path(stage.TABLE).exists()
    scores = run_command(made, *options)
    facts = read_manifest(made.job.path(stage.TABLE)).facts
    assert scores["test"] == facts["test"]
    assert set(facts["seeds"]) == {"1", "2"}
    shown = run_command(made, "--zero-shot", "--dry-run")
    assert shown["finetune"]["moving"] is shown["finetune"]["frozen"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1,x"], "whole numbers"),
        (["--share", "1.5"], "share"),
        (["--set", "finetune.epochs=3"], "unknown config key 'epochs'"),
    ],
)
def test_mistakes_in_options_have_a_message(made: Made, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_command(made, *options)
