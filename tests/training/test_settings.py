"""Settings of a run: the samples that a mixture of shards stands for, and those that cannot be used."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.batches import seen_by
from tests.support.tokenized import User, write_shards
from userrep.config import ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.plan import Coverage
from userrep.data.stream import open_stream, read_shard_sets
from userrep.data.views import ViewConfig
from userrep.manifest import Manifest, write_manifest
from userrep.training.settings import CluePretraining, open_training_stream

VIEWS = ViewConfig(kinds=("service",))


def write_table(directory: Path, num_users: int, digest: str = "1" * 64) -> Path:
    users = [User(f"user {n}", "train", {0: [("a", 1), ("b", 2)], 1: [("c", 3)]}) for n in range(num_users)]
    facts = {"shards": write_shards(directory, [[users]]), "tokenizer_digest": digest}
    write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts=facts))
    return directory


def mixture(shards: Path, weight: float) -> CluePretraining:
    config = CluePretraining(views=VIEWS, global_batch_size=6, num_steps=9)
    return config.with_overrides([f"mix=[{{shards: {shards}, weight: {weight}}}]"])


def test_a_mixture_is_the_plan_over_all_its_shards(tmp_path: Path) -> None:
    own, other = write_table(tmp_path / "own", 12), write_table(tmp_path / "other", 5)
    stream = open_training_stream(own, mixture(other, 0.5))
    assert stream.plan.coverage(9) == [Coverage(samples=12, epochs=3, begun=0), Coverage(samples=5, epochs=3, begun=3)]
    expected = open_stream(read_shard_sets([(own, 1.0), (other, 0.5)]), VIEWS, AugmentConfig(), 6, 0, 9)
    assert [seen_by(batch) for batch in stream.batches()] == [seen_by(batch) for batch in expected.batches()]
    sources = np.concatenate([batch.service_pairs for batch in stream.batches()])
    assert len(np.unique(sources)) == 2


def test_shards_are_found_from_where_the_command_is_issued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = mixture(Path("other"), 1)
    assert config.mix[0].shards == tmp_path / "other"
    assert CluePretraining.parse(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", ".nan"])
def test_a_weight_that_means_nothing_is_refused(weight: str) -> None:
    with pytest.raises(ConfigError, match=r"mix\.0\.weight"):
        CluePretraining().with_overrides([f"mix=[{{shards: x, weight: {weight}}}]"])


def test_a_mixture_that_cannot_be_trained_on_is_an_error_of_the_config(tmp_path: Path) -> None:
    own, few = write_table(tmp_path / "own", 12), write_table(tmp_path / "few", 2)
    with pytest.raises(ConfigError, match="2 training samples of source 1, of which it takes 3"):
        open_training_stream(own, mixture(few, 1.0))
    strange = write_table(tmp_path / "strange", 12, digest="2" * 64)
    with pytest.raises(ConfigError, match="tokenize the data with the model's own tokenizer"):
        open_training_stream(own, mixture(strange, 1.0))


@pytest.mark.parametrize(
    ("coverage", "text"),
    [
        (Coverage(1200, 0, 700), "700 of 1,200 samples are seen, once; 500 never"),
        (Coverage(1200, 3, 700), "1,200 samples are seen 3 times each, 700 of them once more"),
    ],
)
def test_coverage_is_said_in_words(coverage: Coverage, text: str) -> None:
    assert str(coverage) == text
