"""Configs of continual tasks: tasks of shards, and what a pretrained backbone makes of any tasks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import continual_config
from pipelines.continual_config import NOISE, ContinualJobConfig, MethodChoice, ShardTasks
from tests.support.ingested import SERVICES, draw_shards
from tests.support.pretrained import write_encoder
from tests.support.tokenized import write_ingested
from userrep.config import ConfigError
from userrep.data.shard_tasks import ItemQuestion, LabelQuestion, shard_tasks
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.tasks import TaskSet
from userrep.manifest import IncompleteTableError, read_manifest
from userrep.training.backbones import EncoderTable, NextItNetBackbone, PretrainedClue
from userrep.training.cells import ContinualConfig

QUESTIONS = (ItemQuestion(service="buy", max_targets=2), LabelQuestion(label="gender"))
METHODS = tuple(MethodChoice(name=name) for name in ("fineall", "hat"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ingested shards and an encoder."""
    path = tmp_path_factory.mktemp("job")
    write_ingested(path / "data", SERVICES, draw_shards(0))
    write_encoder(path / "encoder")
    return path


def config_of(job: Path, backbone: NextItNetBackbone | PretrainedClue | None = None, **values: Any):
    training = ContinualConfig() if backbone is None else ContinualConfig(backbone=backbone)
    tasks = ShardTasks(path=job / "data", questions=QUESTIONS, max_items=6, max_users=35)
    return ContinualJobConfig(tasks=tasks, methods=METHODS, training=training, **values)


def clue(job: Path) -> PretrainedClue:
    return PretrainedClue(encoder=EncoderTable(path=job / "encoder"))


def assert_same_tasks(own: TaskSet, other: TaskSet, first: int = 0) -> None:
    assert np.array_equal(own.sequences.items, other.sequences.items)
    assert own.sequences.texts == other.sequences.texts
    assert own.facts == other.facts
    for mine, theirs in zip(own.tasks[first:], other.tasks[first:], strict=True):
        assert (mine.name, mine.kind, mine.classes) == (theirs.name, theirs.kind, theirs.classes)
        for values in ("rows", "labels", "split"):
            assert np.array_equal(getattr(mine, values), getattr(theirs, values))


def test_shards_are_read_as_the_config_says_with_one_split_for_all_seeds(job: Path) -> None:
    config = config_of(job)
    expected = shard_tasks(job / "data", QUESTIONS, 6, 35)
    for seed in (0, 1):
        assert_same_tasks(config.build_tasks(seed), expected)
    assert {cell.order for cell in config.cells(expected)} == {("universal", "buy", "gender")}
    assert ContinualJobConfig.parse(json.loads(config.model_dump_json())) == config


def test_a_pretrained_backbone_replaces_the_first_task_alone(job: Path) -> None:
    plain, tasks = config_of(job).build_tasks(), config_of(job, clue(job)).build_tasks()
    assert_same_tasks(tasks, plain, first=1)
    first = tasks.tasks[0]
    assert (first.name, first.kind, first.metric) == ("universal", "vector", "recall_at_10")
    assert first.rows.tolist() == list(range(len(tasks.sequences.items)))
    assert first.split.tolist() == plain.tasks[0].split.tolist()
    assert [task.kind for task in plain.tasks] == ["next_item", "item", "label"]
    # So it is with any other tasks.
    source = SyntheticSource(num_users=120, num_items=200)
    config = config_of(job, clue(job)).model_copy(update={"tasks": continual_config.SyntheticTasks(source=source)})
    found = {seed: config.build_tasks(seed).tasks[0] for seed in (0, 1)}
    assert {(task.name, task.kind) for task in found.values()} == {("T1", "vector")}
    assert not np.array_equal(found[0].split, found[1].split)
    # And with item vectors in place of random ones, it is not.
    start = NextItNetBackbone(dim=8, encoder=clue(job).encoder)
    assert_same_tasks(config_of(job, start).build_tasks(), plain)


def test_noise_has_the_split_of_the_shards(job: Path) -> None:
    tasks = config_of(job, orders=(("universal", NOISE, "gender"),)).build_tasks()
    split_of_row, noise = tasks.tasks[0].split, tasks.tasks[-1]
    assert noise.name == NOISE
    assert noise.split.tolist() == split_of_row[noise.rows].tolist()


def test_methods_that_train_the_first_task_are_refused_at_once(job: Path) -> None:
    for names in (("conure",), ("hat", "mtl", "conure")):
        with pytest.raises(ConfigError, match=rf"methods {', '.join(n for n in names if n != 'hat')} cannot go on"):
            config_of(job, clue(job)).with_overrides([f"methods={[{'name': name} for name in names]}"])
    config_of(job).with_overrides(["methods=[{name: conure}, {name: mtl}]"])


@pytest.mark.parametrize("digest", ["0123456789ab", "123456789012", "000000000000", "12345e678901"])
def test_pinned_fills_in_the_digest_whatever_it_looks_like(
    digest: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(job, PretrainedClue(encoder=EncoderTable(path=Path("encoder"))))
    monkeypatch.chdir(job)
    real = config.pinned().training.backbone.encoder
    assert real == EncoderTable(path=job / "encoder", digest=read_manifest(job / "encoder").digest())
    monkeypatch.setattr("userrep.manifest.Manifest.digest", lambda manifest: digest)
    pinned = config.pinned()
    assert pinned.training.backbone.encoder == EncoderTable(path=job / "encoder", digest=digest)
    assert pinned.pinned() == pinned
    assert ContinualJobConfig.parse(json.loads(pinned.model_dump_json())) == pinned
    # Nothing else is changed by it.
    values, plain = pinned.model_dump(), config.model_dump()
    values["training"]["backbone"]["encoder"] = plain["training"]["backbone"]["encoder"]
    assert values == plain


def test_pinned_leaves_a_config_without_encoder_and_refuses_another_encoder(job: Path, tmp_path: Path) -> None:
    assert config_of(job).pinned() == config_of(job)
    pinned = config_of(job, clue(job)).pinned()
    write_encoder(tmp_path / "encoder", seed=1)
    with pytest.raises(ConfigError, match="is needed: it was trained anew since"):
        pinned.with_overrides([f"training.backbone.encoder.path={tmp_path / 'encoder'}"]).pinned()
    with pytest.raises(IncompleteTableError, match="holds no manifest"):
        config_of(job, clue(tmp_path / "missing")).pinned()


def test_another_encoder_or_other_texts_are_another_experiment(job: Path, tmp_path: Path) -> None:
    """And texts that nothing reads are not."""
    other = tmp_path / "job"
    write_encoder(other / "encoder", seed=1)
    config, tasks = config_of(job, clue(job)).pinned(), config_of(job, clue(job)).build_tasks()
    assert config.identity(tasks) != config_of(job, clue(other)).pinned().identity(tasks)
    texts = ("", *(f"another {text}" for text in (tasks.sequences.texts or ())[1:]))
    changed = TaskSet(type(tasks.sequences)(**{**vars(tasks.sequences), "texts": texts}), tasks.tasks, tasks.facts)
    assert config.identity(tasks) != config.identity(changed)
    assert config_of(job).identity(tasks) == config_of(job).identity(changed)


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "questions"),
        ([{"kind": "label", "label": "a"}, {"kind": "item", "service": "a"}], r"\['a', 'a'\] have a name twice"),
        ([{"kind": "label", "label": "universal"}], "have a name twice, or 'universal' or 'noise'"),
        ([{"kind": "item", "service": "a", "name": "noise"}], "give one of them a `name`"),
        ([{"kind": "item", "service": "a", "max_targets": 0}], "max_targets"),
        ([{"kind": "vector", "label": "a"}], "kind"),
    ],
)
def test_questions_that_cannot_be_asked(questions: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ShardTasks.parse({"path": "data", "questions": questions})
    same = [{"kind": "item", "service": "a"}, {"kind": "item", "service": "a", "name": "b"}]
    assert len(ShardTasks.parse({"path": "data", "questions": same}).questions) == 2


@pytest.mark.parametrize("kind", ["vector", "next_item"])
def test_a_task_file_has_items_or_labels(kind: str) -> None:
    with pytest.raises(ConfigError, match="'item' or 'label'"):
        continual_config.TtlFile.parse({"name": "T2", "kind": kind, "path": "t2.csv"})
