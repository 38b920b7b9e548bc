import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.rivals import (
    PaddedClue,
    PlainClue,
    SortedClue,
    full_matrix_info_nce,
    sentence_transformers_loss,
    sorted_micro_batches,
    take_users,
)
from userrep.data.batch import HistoryBatch
from userrep.models.clue import Clue, ClueConfig
from userrep.training.encoding import encode

VOCAB = 50
MAX_SLOTS = 9


def batch(num_users: int = 5) -> HistoryBatch:
    """Two views of each user; items repeat, the longest has more tokens than positions of its own."""
    rng = np.random.default_rng(0)
    token_lengths = np.array([1, 3, 8, 2, 5, 1, 3])
    history_lengths = np.append(rng.integers(1, MAX_SLOTS + 1, size=2 * num_users - 1), 1)
    return HistoryBatch(
        tokens=rng.integers(0, VOCAB, size=token_lengths.sum(), dtype=np.int32),
        token_offsets=np.append(0, token_lengths.cumsum()).astype(np.int32),
        history_items=rng.integers(0, len(token_lengths), size=history_lengths.sum(), dtype=np.int32),
        history_offsets=np.append(0, history_lengths.cumsum()).astype(np.int32),
        item_keys=np.arange(len(token_lengths)),
    )


def clue() -> Clue:
    """Random everywhere: at initialisation the blocks are the identity and would hide mistakes."""
    torch.manual_seed(0)
    model = Clue(ClueConfig(dim=16, item_layers=2, service_layers=2, num_heads=4, mlp_ratio=4, max_tokens=6), VOCAB)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("rival", [lambda model: PaddedClue(model, MAX_SLOTS), lambda model: SortedClue(model, 3)])
def test_rivals_compute_the_vectors_and_gradients_of_clue(rival) -> None:
    model = clue()
    other: PlainClue = rival(model)
    weights = torch.randn(10, 16)
    expected = encode(model, batch())
    (expected * weights).sum().backward()
    received = other(batch())
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-5)
    (received * weights).sum().backward()
    assert model.token_embedding.weight.grad is not None
    torch.testing.assert_close(
        other.token_embedding.weight.grad, model.token_embedding.weight.grad, rtol=1e-4, atol=1e-5
    )


def test_rivals_take_every_weight() -> None:
    model = clue()
    other = SortedClue(model)
    unused = model.logit_bias.numel()  # the sigmoid loss alone has one
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters()) - unused


def test_vectors_of_some_users_are_those_of_the_whole_batch() -> None:
    model = SortedClue(clue())
    expected = model(batch())[[1, 2, 3, 6, 7, 8]]
    torch.testing.assert_close(model(take_users(batch(), 1, 4)), expected, rtol=0, atol=1e-6)


def test_micro_batches_hold_every_position_once_by_rising_length() -> None:
    lengths = np.array([4, 1, 3, 1, 9, 2, 2])
    parts = list(sorted_micro_batches(lengths, 3))
    assert [len(part) for part in parts] == [3, 3, 1]
    order = np.concatenate(parts)
    assert sorted(order) == list(range(7))
    assert (np.diff(lengths[order]) >= 0).all()


def test_full_matrix_loss_equals_its_definition() -> None:
    anchor, positive = (F.normalize(torch.randn(5, 4, dtype=torch.float64), dim=1) for _ in range(2))
    scale = 3.0
    exp = (scale * anchor @ positive.T).exp()
    expected = -(exp.diag() / exp.sum(1)).log().mean() / 2 - (exp.diag() / exp.sum(0)).log().mean() / 2
    torch.testing.assert_close(full_matrix_info_nce(anchor, positive, torch.tensor(scale).log().double()), expected)


@pytest.mark.parametrize("mini_batch_size", [4, 32])
def test_sentence_transformers_computes_the_same_loss_and_gradients(mini_batch_size: int) -> None:
    torch.manual_seed(0)
    anchor, positive = (F.normalize(torch.randn(11, 8), dim=1).requires_grad_() for _ in range(2))
    expected = full_matrix_info_nce(anchor, positive, torch.tensor(14.0).log())
    expected_grads = torch.autograd.grad(expected, (anchor, positive))
    received = sentence_transformers_loss(mini_batch_size, 14.0)(anchor, positive)
    torch.testing.assert_close(received, expected.detach(), rtol=1e-5, atol=1e-6)
    for tensor, grad in zip((anchor, positive), expected_grads, strict=True):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-4, atol=1e-6)
