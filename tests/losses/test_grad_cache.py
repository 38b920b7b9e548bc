"""Chunked encoding: the same values and gradients as at once, with dropout too, and one graph at a time."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from userrep.losses.grad_cache import GraphSize, encode_in_chunks, measure_graph

ROWS = torch.randn(23, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def make_encoder(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 4)).double()


def whole_batch_loss(vectors: torch.Tensor) -> torch.Tensor:
    """A loss in which every row meets every other."""
    return torch.logsumexp(vectors @ vectors.T, dim=1).mean()


def gradient(encoder: nn.Module, vectors: torch.Tensor) -> list[torch.Tensor]:
    encoder.zero_grad()
    whole_batch_loss(vectors).backward()
    return [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("chunk_size", [1, 4, 22, 23, 100])
@pytest.mark.parametrize("num_kept", [0, 1, 3, 100])
def test_equals_encoding_at_once(chunk_size: int, num_kept: int) -> None:
    encoder = make_encoder()
    expected = gradient(encoder, encoder(ROWS))
    actual = gradient(encoder, encode_in_chunks(encoder, ROWS.split(chunk_size), num_kept))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_dropout_is_the_same_when_encoded_again() -> None:
    encoder = make_encoder(dropout=0.5)
    chunks = ROWS.split(5)
    torch.manual_seed(2)
    expected = gradient(encoder, torch.cat([encoder(chunk) for chunk in chunks]))
    torch.manual_seed(2)
    actual = gradient(encoder, encode_in_chunks(encoder, chunks))
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_kept", [1, 2])
def test_every_chunk_but_the_kept_ones_is_encoded_twice(num_kept: int) -> None:
    encoder, calls = make_encoder(), []

    def encode(chunk: torch.Tensor) -> torch.Tensor:
        calls.append(len(chunk))
        return encoder(chunk)

    vectors = encode_in_chunks(encode, ROWS.split(7), num_kept)  # chunks of 7, 7, 7, 2
    assert calls == [7, 7, 7, 2]
    whole_batch_loss(vectors).backward()
    assert len(calls) == 4 + 4 - num_kept


def test_without_gradient_everything_is_encoded_once() -> None:
    encoder, calls = make_encoder(), []
    with torch.no_grad():
        encode_in_chunks(lambda chunk: calls.append(1) or encoder(chunk), ROWS.split(7))
    assert len(calls) == 4


def test_measured_graph_is_what_the_layers_save() -> None:
    encoder = make_encoder()
    state = torch.random.get_rng_state()
    size = measure_graph(lambda: encoder(ROWS))
    # Input of the first layer, and output of tanh, which is the input of the second layer; 8 bytes each.
    assert size.total_bytes == 8 * (23 * 6 + 23 * 9)
    assert size.largest_bytes == 8 * 23 * 9
    assert torch.equal(torch.random.get_rng_state(), state)


def test_fake_tensors_show_the_size_of_a_graph_that_is_never_made() -> None:
    def size(rows: int) -> GraphSize:
        encoder = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))
        return measure_graph(lambda: encoder(torch.zeros(rows, 6)).relu())

    with FakeTensorMode():
        fake, huge = size(23), size(2**40)  # the latter's rows alone are 24 TiB
    assert fake == size(23)
    assert huge.largest_bytes == 4 * 9 * 2**40
