"""A cell's evaluation: the numbers of what it is made of, the same for users in parts of any size, and no leak."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.tokenized import Group, User, write_shards
from userrep.data.pool import load_pool
from userrep.data.probe_users import load_probe_users
from userrep.data.views import ViewConfig
from userrep.evaluation.pool_loss import best_scale, infonce
from userrep.evaluation.probe import ProbeConfig
from userrep.evaluation.ranking import retrieval_hits
from userrep.inference import encode_users
from userrep.manifest import Manifest, read_manifest, write_manifest
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue, ClueConfig
from userrep.training import cell_evaluation
from userrep.training.cell_evaluation import CellEvaluation, EvaluationConfig, probe_vectors
from userrep.training.encoders import ClueEncoder
from userrep.training.validation import encode_pool

VIEWS = ViewConfig(kinds=("time",), max_events=7)
CONFIG = EvaluationConfig(
    pool_size=40,
    num_probe_train=120,
    num_probe_test=60,
    probe_max_events=6,
    probe=ProbeConfig(hidden_dim=16, learning_rate=1e-2, batch_size=32),
)
ITEMS = {"early": "abcdefgh", "late": "stuvwxyz"}


def draw_users(num_users: int, seed: int = 0) -> list[User]:
    """Users of two tastes, of which the label tells; the label `coin` tells nothing."""
    rng = np.random.default_rng(seed)
    users = []
    for number in range(num_users):
        taste = ("early", "late")[number % 2]
        histories = {}
        for service in range(1 + number % 3):
            items = rng.choice(list(ITEMS[taste]), size=rng.integers(2, 9)).tolist()
            histories[service] = [(item, 10 * place + service) for place, item in enumerate(items)]
        labels = (("coin", str(rng.integers(0, 2))), ("taste", taste))
        users.append(User(f"user {number}", ("train", "train", "test")[number // 2 % 3], histories, labels))
    return users


def write_table(directory: Path, shards: list[list[Group]]) -> Path:
    facts = {"shards": write_shards(directory, shards)}
    write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts=facts))
    return directory


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    users = draw_users(200)
    return write_table(tmp_path_factory.mktemp("shards"), [[users[:70], users[70:90]], [], [users[90:]]])


@pytest.fixture(scope="module")
def evaluation(shards: Path) -> CellEvaluation:
    return CellEvaluation(shards, CONFIG, VIEWS)


def new_model(seed: int = 0) -> Clue:
    torch.manual_seed(seed)
    model = Clue(ClueConfig(dim=8, num_heads=2), 1010)
    for parameter in model.parameters():
        if parameter.ndim:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_pool_is_measured_as_by_the_parts(shards: Path, evaluation: CellEvaluation):
    model = new_model()
    for max_events in (2, 6):
        measured = evaluation.measure(model, max_events)
        pool = load_pool(shards, read_manifest(shards).facts["shards"], VIEWS, "test", 40)
        anchor, positive = encode_pool(model, replace(pool, max_events=max_events))
        hits = retrieval_hits(anchor @ positive.T)
        assert measured.loss == pytest.approx(best_scale(anchor, positive).loss, abs=1e-5)
        assert measured.loss == pytest.approx(infonce(anchor, positive, measured.best_scale), abs=1e-5)
        assert measured.loss_as_trained == pytest.approx(infonce(anchor, positive, 1 / 0.07), abs=1e-4)
        assert measured.loss <= measured.loss_as_trained
        assert (measured.recall_at_1, measured.recall_at_10) == pytest.approx(
            (hits[1].mean(), hits[10].mean()), abs=1e-2
        )
        assert measured.pool_size == len(evaluation) == 40
    assert model.training


def test_probes_learn_what_there_is_to_learn(evaluation: CellEvaluation):
    measured, chance = evaluation.measure(new_model(), 6), evaluation.chance()
    assert (
        set(measured.downstream_losses)
        == set(measured.downstream_scores)
        == set(chance)
        == {"coin", "taste", "next_item"}
    )
    assert measured.downstream_scores["taste"] > 0.95
    assert measured.downstream_losses["taste"] < 0.3 * math.log(2)
    assert measured.downstream_losses["coin"] == pytest.approx(chance["coin"].loss, abs=0.1)
    # The next item is any of the eight of a taste, among all sixteen.
    assert math.log(8) - 0.1 < measured.downstream_losses["next_item"] < math.log(16) - 0.3
    assert measured.downstream_scores["next_item"] > chance["next_item"].score + 0.1


def test_measuring_is_deterministic_and_independent_of_parts(
    evaluation: CellEvaluation, monkeypatch: pytest.MonkeyPatch
):
    model = new_model()
    first = evaluation.measure(model, 5)
    assert evaluation.measure(model, 5) == first
    assert evaluation.measure(new_model(1), 5).loss != first.loss
    monkeypatch.setattr(cell_evaluation, "ITEM_VECTORS_BYTES", 4 * 8 * 20)
    in_parts = evaluation.measure(model, 5)
    assert in_parts.loss == pytest.approx(first.loss, abs=1e-5)
    assert in_parts.downstream_losses == pytest.approx(first.downstream_losses, abs=1e-2)


def test_whole_vectors_are_those_that_are_published(shards: Path):
    users = load_probe_users(shards, read_manifest(shards).facts["shards"], 30, 20, 4)
    model = new_model().eval()
    whole, before = probe_vectors(model, users, 3)
    np.testing.assert_allclose(whole, encode_users(ClueEncoder(model), users.group, 3), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(before, axis=1), 1, atol=1e-6)
    assert not np.allclose(before, whole, atol=1e-3)
    alone = probe_vectors(model, users, 3, is_whole=False)
    assert not alone[0].any()
    np.testing.assert_allclose(alone[1], before, atol=1e-6)


def test_the_last_event_is_not_seen_before_it(tmp_path: Path):
    users = draw_users(40)
    changed = []
    for user in users:
        histories = {service: list(history) for service, history in user.histories.items()}
        last = max(histories, key=lambda service: (histories[service][-1][1], service))
        histories[last][-1] = ("m", histories[last][-1][1])
        changed.append(user._replace(histories=histories))
    model, vectors = new_model().eval(), []
    for name, table in (("users", users), ("changed", changed)):
        facts = write_shards(tmp_path / name, [[table]])
        vectors.append(probe_vectors(model, load_probe_users(tmp_path / name, facts, 40, 40, 6), 6))
    (whole, before), (changed_whole, changed_before) = vectors
    np.testing.assert_allclose(changed_before, before, atol=1e-6)
    assert (np.abs(changed_whole - whole).max(axis=1) > 1e-3).all()


def test_users_of_one_event_have_nothing_before_it(tmp_path: Path):
    users = [User(f"u{n}", "train" if n else "test", {0: [("a", 1)]}) for n in range(3)]
    probed = load_probe_users(tmp_path, write_shards(tmp_path, [[users]]), 5, 5, 6)
    whole, before = probe_vectors(new_model(), probed, 6, is_whole=False)
    assert whole.shape == before.shape == (3, 8)
    assert not before.any()


def test_probes_can_be_left_out(shards: Path):
    config = CONFIG.model_copy(update={"probe_labels": False, "probe_next_item": False})
    measured = CellEvaluation(shards, config, VIEWS).measure(new_model(), 50)  # no probe user limits it
    assert measured.downstream_losses == measured.downstream_scores == {}
    for left, names in (("probe_labels", {"next_item"}), ("probe_next_item", {"coin", "taste"})):
        other = CellEvaluation(shards, CONFIG.model_copy(update={left: False}), VIEWS)
        assert set(other.measure(new_model(), 3).downstream_scores) == names


def test_a_bag_of_tokens_is_measured_too(evaluation: CellEvaluation):
    measured = asdict(evaluation.measure(BagOfTokens(1010, 4), 3))
    scores = {**measured.pop("downstream_losses"), **measured.pop("downstream_scores"), **measured}
    assert np.isfinite(list(scores.values())).all()


def test_unusable_cells_are_refused(evaluation: CellEvaluation, tmp_path: Path):
    with pytest.raises(ValueError, match="max_events is 7, the probe users have 6"):
        evaluation.measure(new_model(), 7)
    with pytest.raises(ValueError, match="max_events is 0"):
        evaluation.measure(new_model(), 0)
    model = new_model()
    model.token_embedding.weight.data[:] = math.nan
    with pytest.raises(ValueError, match="the encoder has diverged"):
        evaluation.measure(model, 3)
    assert model.training
    few = write_table(tmp_path / "few", [[draw_users(12)]])
    with pytest.raises(ValueError, match="of 8 training users and 4 held-out ones a next item is known"):
        CellEvaluation(few, CONFIG, VIEWS)
    named = [user._replace(labels=(("next_item", user.labels[1][1]),)) for user in draw_users(120)]
    with pytest.raises(ValueError, match="a profile label is called 'next_item'"):
        CellEvaluation(write_table(tmp_path / "named", [[named]]), CONFIG, VIEWS)
