"""The probe: what is there to learn is learned, nothing is learned from noise, and a seed gives one result."""

import numpy as np
import pytest
import torch

from userrep.evaluation.probe import ProbeConfig, ProbeResult, class_frequencies, fit_probe

CONFIG = ProbeConfig(hidden_dim=32, learning_rate=5e-3, batch_size=128)


def unit_vectors(num_users: int, dim: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_users, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def probe(
    vectors: np.ndarray, labels: np.ndarray, num_train: int, config: ProbeConfig = CONFIG, **options
) -> ProbeResult:
    return fit_probe(
        vectors[:num_train], labels[:num_train], vectors[num_train:], labels[num_train:], config, **options
    )


def test_a_function_of_the_vector_is_learned():
    vectors = unit_vectors(2000, 8, 0)
    vectors = vectors[np.abs(vectors[:, 0]) > 0.1]  # no user is undecided
    result = probe(vectors, (vectors[:, 0] > 0).astype(int), 1000)
    assert result.score > 0.98
    assert result.loss < 0.1


def test_what_is_no_linear_function_is_learned():
    vectors = unit_vectors(3000, 2, 1)
    vectors = vectors[np.abs(vectors).min(axis=1) > 0.1]
    assert probe(vectors, (vectors[:, 0] * vectors[:, 1] > 0).astype(int), 1600).score > 0.95


@pytest.mark.parametrize("seed", range(3))
def test_random_labels_have_the_loss_of_their_frequencies(seed: int):
    rng = np.random.default_rng(seed)
    labels = rng.choice(4, p=[0.5, 0.3, 0.15, 0.05], size=2400)
    result, chance = probe(unit_vectors(2400, 32, seed), labels, 1600), class_frequencies(labels[:1600], labels[1600:])
    assert abs(result.loss - chance.loss) < 0.03  # about two standard errors of a mean over 800 users
    assert abs(result.score - chance.score) < 0.06


def test_frequencies_are_those_of_training():
    chance = class_frequencies(np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2]))
    shares = np.array([4, 2, 1]) / 7  # each counted once more
    assert chance.loss == pytest.approx(-np.log(shares[[0, 1, 1, 2]]).mean())
    assert chance.score == 0.25
    assert class_frequencies(np.array([0, 1]), np.array([0, 1]), k=1).score == 0.5  # a tie
    assert class_frequencies(np.arange(20), np.arange(20), k=10).score == pytest.approx(0.5)
    assert class_frequencies(np.array([0, 0]), np.array([0]), num_classes=6).loss == pytest.approx(-np.log(3 / 8))


def test_classes_are_found_by_their_vectors():
    rng = np.random.default_rng(0)
    users, classes = unit_vectors(1500, 6, 2), unit_vectors(30, 6, 3)
    labels = (users @ classes.T).argmax(axis=1)
    turned = users @ np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)
    result = probe(turned, labels, 1000, class_vectors_CK=classes, k=10)
    assert result.score > 0.95
    assert result.loss < 0.7 * np.log(30)
    # Classes that no training user has are found too.
    seen = np.flatnonzero(labels[:1000] < 25)
    unseen = 1000 + np.flatnonzero(labels[1000:] >= 25)
    parts = turned[seen], labels[seen], turned[unseen], labels[unseen]
    assert fit_probe(*parts, CONFIG, classes, k=10).score > 0.6


def test_classes_with_equal_vectors_are_tied():
    labels = np.random.default_rng(0).integers(0, 20, size=200)
    result = probe(unit_vectors(200, 4, 0), labels, 100, class_vectors_CK=np.ones((20, 3)), k=10)
    assert result.score == pytest.approx(0.5)
    assert result.loss == pytest.approx(np.log(20), abs=1e-6)


def test_a_seed_gives_one_result_and_leaves_that_of_torch_alone():
    vectors, labels = unit_vectors(600, 8, 0), np.random.default_rng(0).integers(0, 3, size=600)
    labels[vectors[:, 0] > 0] = 0
    torch.manual_seed(1)
    first, state = probe(vectors, labels, 400), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert probe(vectors, labels, 400) == first
    assert probe(vectors, labels, 400, CONFIG.model_copy(update={"seed": 1})) != first


def test_units_of_the_vectors_are_of_no_influence():
    vectors, labels = unit_vectors(600, 8, 0), (unit_vectors(600, 8, 0)[:, 1] > 0).astype(int)
    plain, moved = probe(vectors, labels, 400), probe(4 * vectors + 2, labels, 400)
    assert moved.loss == pytest.approx(plain.loss, rel=1e-2)
    constant = np.concatenate([vectors, np.ones((600, 1), dtype=np.float32)], axis=1)
    assert np.isfinite(probe(constant, labels, 400).loss)


def test_unusable_input_is_refused():
    vectors, labels = unit_vectors(40, 4, 0), np.arange(40) % 3
    with pytest.raises(ValueError, match=r"vectors are \(20, 4\) and labels \(40,\)"):
        fit_probe(vectors[:20], labels, vectors, labels, CONFIG)
    with pytest.raises(ValueError, match="5 users with a label: a probe needs at least 10"):
        probe(vectors, labels, 5)
    with pytest.raises(ValueError, match="40 training and 0 test users"):
        probe(vectors, labels, 40)
    with pytest.raises(ValueError, match="labels are -1 to 1"):
        probe(vectors, labels - 1, 20)
    with pytest.raises(ValueError, match="labels are 0 to 2: classes are 0 to 1"):
        probe(vectors, labels, 20, class_vectors_CK=np.ones((2, 3)))
    with pytest.raises(ValueError, match="one encoder's"):
        fit_probe(vectors, labels, vectors[:, :3], labels, CONFIG)
    vectors[30] = np.inf
    with pytest.raises(ValueError, match="the encoder has diverged"):
        probe(vectors, labels, 20)
