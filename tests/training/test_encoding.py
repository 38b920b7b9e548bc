"""The packed, chunked two-level encoder against a plain loop over users, items and tokens."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from userrep.data.batch import HistoryBatch
from userrep.models.bag_of_tokens import BagOfTokens
from userrep.models.clue import Clue, ClueConfig
from userrep.models.layers import Transformer
from userrep.models.packing import Groups
from userrep.training.encoding import (
    MAX_TENSOR_BYTES,
    ChunkPlan,
    Encoder,
    MemoryConfig,
    MemoryPlanner,
    encode,
    encoded_twice,
)

ITEM_LENGTHS = [1, 7, 4, 5, 13, 1, 8]
HISTORIES = [[0], [3, 3, 1, 4, 2], [6, 5, 4, 3, 2, 1, 0, 0, 6], [2, 2]]
VOCAB = 50


def offsets(lengths: list[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)


def batch() -> HistoryBatch:
    return HistoryBatch(
        tokens=np.random.default_rng(1).integers(0, VOCAB, sum(ITEM_LENGTHS)).astype(np.int32),
        token_offsets=offsets(ITEM_LENGTHS),
        history_items=np.array([item for history in HISTORIES for item in history], dtype=np.int32),
        history_offsets=offsets([len(history) for history in HISTORIES]),
        item_keys=np.arange(len(ITEM_LENGTHS)),
    )


def item_tokens() -> list[torch.Tensor]:
    return [torch.from_numpy(part.astype(np.int64)) for part in np.split(batch().tokens, batch().token_offsets[1:-1])]


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
        x = x + block.mlp_out(F.gelu(block.mlp_in(block.mlp_norm(x))))
    return x.mean(dim=0)


def naive_users(model: Clue) -> torch.Tensor:
    users = []
    for history in HISTORIES:
        items = []
        for item in history:
            ids = item_tokens()[item]
            positions = torch.arange(len(ids)).clamp(max=model.config.max_tokens - 1)
            items.append(
                naive(model.item_transformer, model.token_embedding(ids) + model.token_position.weight[positions])
            )
        users.append(naive(model.user_encoder.service_transformer, torch.stack(items)))
    pooled = torch.stack(users)
    hidden = F.gelu(model.user_encoder.head_in(model.user_encoder.head_norm(pooled)))
    return F.normalize(pooled + model.user_encoder.head_out(hidden), dim=-1)


@pytest.mark.parametrize("plan", [ChunkPlan(1, 1), ChunkPlan(6, 2), ChunkPlan(14, 4), ChunkPlan(1000, 1)])
@pytest.mark.parametrize(("item_layers", "service_layers"), [(1, 1), (2, 2), (0, 1)])
def test_equals_naive_reference(item_layers: int, service_layers: int, plan: ChunkPlan) -> None:
    config = ClueConfig(dim=8, num_heads=2, item_layers=item_layers, service_layers=service_layers, max_tokens=6)
    model = trained_like(Clue(config, VOCAB))
    assert isinstance(model, Clue)
    probe = torch.randn(len(HISTORIES), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gradients = []
    for users in (encode(model, batch(), plan), naive_users(model)):
        model.zero_grad()
        (users * probe).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(encode(model, batch(), plan), naive_users(model), rtol=0, atol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-11)


class Spy(Clue):
    """Notes the lengths of all sequences that it encodes."""

    def __init__(self, config: ClueConfig) -> None:
        super().__init__(config, VOCAB)
        self.item_lengths: list[int] = []
        self.history_lengths: list[int] = []

    def encode_items(self, tokens_T: torch.Tensor, groups: Groups, use_blocks: bool = True) -> torch.Tensor:
        self.item_lengths += [length for count, length in groups.shapes for _ in range(count)]
        return super().encode_items(tokens_T, groups, use_blocks)

    def encode_histories(
        self, item_UD: torch.Tensor, history_items_E: torch.Tensor, groups: Groups, use_blocks: bool = True
    ) -> torch.Tensor:
        self.history_lengths += [length for count, length in groups.shapes for _ in range(count)]
        return super().encode_histories(item_UD, history_items_E, groups, use_blocks)


@pytest.mark.parametrize(
    "plan", [ChunkPlan(1, 1), ChunkPlan(1, 4), ChunkPlan(6, 2), ChunkPlan(14, 4), ChunkPlan(99, 2)]
)
def test_sequences_that_are_said_to_be_encoded_twice_are(plan: ChunkPlan) -> None:
    spy = Spy(ClueConfig(dim=8, num_heads=2))
    encode(spy, batch(), plan).sum().backward()
    # The forward pass comes first, so what was noted later was encoded again.
    again = spy.item_lengths[len(ITEM_LENGTHS) :], spy.history_lengths[len(HISTORIES) :]
    assert [sorted(lengths) for lengths in again] == [sorted(lengths) for lengths in encoded_twice(batch(), plan)]


def test_new_model_is_a_bag_of_tokens() -> None:
    model = Clue(ClueConfig(dim=8, num_heads=2), VOCAB)
    items = [model.token_embedding(tokens).mean(0) for tokens in item_tokens()]
    expected = F.normalize(
        torch.stack([torch.stack([items[i] for i in history]).mean(0) for history in HISTORIES]), dim=-1
    )
    torch.testing.assert_close(encode(model, batch()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encode(model, batch(), use_blocks=False), expected, rtol=0, atol=1e-6)


def test_order_of_items_in_the_dictionary_is_irrelevant() -> None:
    model = trained_like(Clue(ClueConfig(dim=8, num_heads=2), VOCAB))
    order = np.array([4, 0, 6, 2, 1, 5, 3])
    shuffled = replace(
        batch(),
        tokens=np.concatenate([item_tokens()[item].numpy() for item in order]),
        token_offsets=offsets([ITEM_LENGTHS[item] for item in order]),
        history_items=np.argsort(order)[batch().history_items],
    )
    torch.testing.assert_close(encode(model, shuffled), encode(model, batch()), rtol=0, atol=1e-12)


def test_bag_of_tokens_equals_naive_reference() -> None:
    model = trained_like(BagOfTokens(VOCAB, 8))
    items = [model.token_embedding(tokens).mean(0) for tokens in item_tokens()]
    pooled = torch.stack([torch.stack([items[i] for i in history]).mean(0) for history in HISTORIES])
    first, _, second = model.head
    expected = F.normalize(second(F.gelu(first(pooled))), dim=-1)
    torch.testing.assert_close(encode(model, batch()), expected, rtol=1e-12, atol=1e-12)


def test_float32_equals_float64_to_the_sixth_digit() -> None:
    config = ClueConfig(dim=8, num_heads=2, item_layers=2, service_layers=2)
    exact = trained_like(Clue(config, VOCAB))
    single = Clue(config, VOCAB)
    single.load_state_dict({name: value.float() for name, value in exact.state_dict().items()})
    probe = torch.randn(len(HISTORIES), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (naive_users(exact) * probe).sum().backward()
    (encode(single, batch(), ChunkPlan(9, 1)) * probe.float()).sum().backward()
    for (name, expected), actual in zip(exact.named_parameters(), single.parameters(), strict=True):
        if expected.grad is not None and expected.grad.abs().max() > 1e-9:  # keys' biases have none
            assert actual.grad is not None
            assert (actual.grad - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max(), name


def planned(model: Encoder, budget_mib: int, chunk_size: int | None = None) -> tuple[ChunkPlan, MemoryPlanner]:
    memory = MemoryConfig(budget_mib=budget_mib, chunk_size=chunk_size or "auto")
    planner = MemoryPlanner(model, memory)
    return planner.plan(batch()), planner


def test_what_a_position_needs_is_what_autograd_saves() -> None:
    # Without blocks: the token ids of 8 bytes alone. A block adds, in vectors of width D: LN input and output, q k v,
    # attention output, LN input and output, 2 x MLP hidden; with flash attention's log-sum-exps and LN statistics.
    bare = planned(Clue(ClueConfig(dim=64, item_layers=0, service_layers=0), VOCAB), 64)[1].bytes_per_position
    with_block = planned(Clue(ClueConfig(dim=64, item_layers=1, service_layers=0, mlp_ratio=4), VOCAB), 64)[1]
    per_width = (with_block.bytes_per_position - bare) / (4 * 64)
    assert 14 <= per_width <= 22  # less than the sum of 16: an event that is alone in its history attends to nothing


def test_chunks_fit_the_budget() -> None:
    model = Clue(ClueConfig(dim=64, item_layers=2, service_layers=2, mlp_ratio=4), VOCAB)
    small, planner = planned(model, 64)
    large, _ = planned(model, 4096)
    assert small.chunk_size * (small.num_kept + 1) * planner.bytes_per_position <= 64 * 2**20
    assert large.num_kept > small.num_kept
    widest = 4 * 64 * 4  # the MLP's hidden layer
    assert large.chunk_size == MAX_TENSOR_BYTES // widest
    assert planned(model, 4096, chunk_size=7)[0].chunk_size == 7


def test_a_budget_too_small_for_anything_still_works() -> None:
    model = Clue(ClueConfig(dim=64), VOCAB)
    planner = MemoryPlanner(model, MemoryConfig(budget_mib=64))
    planner.bytes_per_position, planner._largest_per_position = 1e9, 1e8
    assert planner.plan(batch()) == ChunkPlan(1, 2)
