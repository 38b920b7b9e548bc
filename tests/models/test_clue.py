"""The packed two-level encoder against a plain loop over users, items and tokens."""

import pytest
import torch
import torch.nn.functional as F

from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue, ClueConfig, count_parameters
from userrep.models.layers import Transformer

ITEM_LENGTHS = [1, 7, 4, 5, 13, 1, 8]
HISTORIES = [[0], [3, 3, 1, 4, 2], [6, 5, 4, 3, 2, 1, 0, 0, 6], [2, 2]]
VOCAB = 50


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB, (sum(ITEM_LENGTHS),), generator=generator)
    token_offsets = F.pad(torch.tensor(ITEM_LENGTHS).cumsum(0), (1, 0))
    history_items = torch.tensor([item for history in HISTORIES for item in history])
    history_offsets = F.pad(torch.tensor([len(history) for history in HISTORIES]).cumsum(0), (1, 0))
    return tokens, token_offsets, history_items, history_offsets


def trained_like(model: torch.nn.Module) -> torch.nn.Module:
    """Parameters away from their zero initialisation, in float64."""
    generator = torch.Generator().manual_seed(2)
    model = model.double()
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def naive(transformer: Transformer, sequence: torch.Tensor) -> torch.Tensor:
    """Mean of one sequence's last hidden vectors, with attention written out; sequence (L, D)."""
    x = sequence
    for block in transformer.blocks:
        L, D = x.shape
        qkv = block.query_key_value(block.attention_norm(x)).view(L, 3, block.num_heads, -1)
        heads = []
        for head in range(block.num_heads):
            query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            weights = torch.softmax(query @ key.T / query.shape[1] ** 0.5, dim=-1)
            heads.append(weights @ value)
        x = x + block.attention_out(torch.cat(heads, dim=1))
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x)), approximate="tanh"))
    return x.mean(dim=0)


def naive_users(model: Clue) -> torch.Tensor:
    tokens, token_offsets, _, _ = batch()
    users = []
    for history in HISTORIES:
        items = []
        for item in history:
            ids = tokens[token_offsets[item] : token_offsets[item + 1]]
            positions = torch.arange(len(ids)).clamp(max=model.config.max_tokens - 1)
            items.append(
                naive(model.item_transformer, model.token_embedding(ids) + model.token_position.weight[positions])
            )
        users.append(naive(model.service_transformer, torch.stack(items)))
    pooled = torch.stack(users)
    hidden = F.gelu(model.head_in(model.head_norm(pooled)))
    return F.normalize(pooled + model.head_out(hidden), dim=-1)


@pytest.mark.parametrize(("item_layers", "service_layers"), [(1, 1), (2, 2), (0, 1)])
def test_equals_naive_reference(item_layers: int, service_layers: int) -> None:
    config = ClueConfig(dim=8, num_heads=2, item_layers=item_layers, service_layers=service_layers, max_tokens=6)
    model = trained_like(Clue(config, VOCAB))
    assert isinstance(model, Clue)
    probe = torch.randn(len(HISTORIES), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for users in (model(*batch()), naive_users(model)):
        model.zero_grad()
        (users * probe).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(model(*batch()), naive_users(model), rtol=0, atol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)


def test_new_model_is_a_bag_of_tokens() -> None:
    model = Clue(ClueConfig(dim=8, num_heads=2), VOCAB)
    tokens, token_offsets, _, _ = batch()
    items = [
        model.token_embedding(tokens[start:stop]).mean(0)
        for start, stop in zip(token_offsets, token_offsets[1:], strict=False)
    ]
    expected = F.normalize(
        torch.stack([torch.stack([items[i] for i in history]).mean(0) for history in HISTORIES]), dim=-1
    )
    torch.testing.assert_close(model(*batch()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(*batch(), use_blocks=False), expected, rtol=0, atol=1e-6)


def test_order_of_items_in_the_dictionary_is_irrelevant() -> None:
    model = trained_like(Clue(ClueConfig(dim=8, num_heads=2), VOCAB))
    tokens, token_offsets, history_items, history_offsets = batch()
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    lengths = token_offsets.diff()[order]
    moved = torch.cat([tokens[token_offsets[i] : token_offsets[i + 1]] for i in order])
    shuffled = (moved, F.pad(lengths.cumsum(0), (1, 0)), order.argsort()[history_items], history_offsets)
    torch.testing.assert_close(model(*shuffled), model(*batch()), rtol=0, atol=1e-12)


def test_bag_of_tokens_equals_naive_reference() -> None:
    model = trained_like(BagOfTokens(VOCAB, 8))
    tokens, token_offsets, _, _ = batch()
    items = [
        model.token_embedding(tokens[start:stop]).mean(0)
        for start, stop in zip(token_offsets, token_offsets[1:], strict=False)
    ]
    pooled = torch.stack([torch.stack([items[i] for i in history]).mean(0) for history in HISTORIES])
    first, _, second = model.head
    expected = F.normalize(second(F.gelu(first(pooled))), dim=-1)
    torch.testing.assert_close(model(*batch()), expected, rtol=1e-12, atol=1e-12)


def test_parameter_count() -> None:
    counts = count_parameters(Clue(ClueConfig(dim=8, num_heads=2, item_layers=1, service_layers=2, mlp_ratio=4), VOCAB))
    # per block: 2 layer norms (2 * 2D), attention 4 (D*D + D), MLP 2 * 4D*D + 4D + D
    blocks = 3 * (4 * 8 + 4 * (64 + 8) + 2 * 4 * 64 + 32 + 8)
    head = 2 * 8 + 2 * 2 * 64 + 2 * 8 + 8
    assert counts["non_embedding"] == blocks + head + 1  # and the temperature
    assert counts["total"] == counts["non_embedding"] + counts["embedding"]
