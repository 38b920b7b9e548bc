"""The loss against whole matrices and autograd; on what it does not depend; what it reports."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.distributed import run_ranks
from tests.support.histories import random_histories
from tests.support.pretrained import shake
from userrep.data.batch import UserBatch
from userrep.data.item_sequences import TokenSequences, item_sequences
from userrep.data.vocabulary import Vocabulary
from userrep.data.word_masking import MaskingConfig, mask_words, sequence_keys
from userrep.models.packing import Groups
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.encoding import MemoryConfig
from userrep.training.recformer_encoding import encode_sequences
from userrep.training.recformer_objective import RecformerLossConfig, RecformerObjective

SIZE, NUM_USERS, SEED = 50, 6, 3
CONFIG = RecformerConfig(dim=8, num_heads=2, mlp_dim=12, window=4, max_items=4, max_tokens=30, temperature=0.1)
LOSS = RecformerLossConfig(masked_lm_weight=0.3, masking=MaskingConfig(share=0.4))
VOCABULARY = Vocabulary(
    size=SIZE,
    cls_id=48,
    mask_id=49,
    unknown_id=0,
    is_special=np.arange(SIZE) >= 48,
    is_word_start=np.arange(SIZE) % 3 == 0,
)


def make_batch(first: int = 0, last: int = NUM_USERS) -> UserBatch:
    """Some of six users; positives are single items."""
    histories = random_histories(2 * NUM_USERS, 9, 6, 9, 48, seed=0)
    parts = np.split(histories.history_items, histories.history_offsets[1:-1])
    kept = parts[first:last] + [part[:1] for part in parts[NUM_USERS + first : NUM_USERS + last]]
    return UserBatch(
        tokens=histories.tokens,
        token_offsets=histories.token_offsets,
        history_items=np.concatenate(kept),
        history_offsets=np.cumsum([0, *map(len, kept)]).astype(np.int32),
        user_keys=np.arange(10, 10 + NUM_USERS)[first:last],
        service_pairs=np.zeros(last - first, dtype=np.int64),
        step=5,
        item_keys=np.arange(100, 109),
    )


def make_model(window: int | None = 4, **values: object) -> Recformer:
    torch.manual_seed(0)
    model = Recformer(CONFIG.model_copy(update={"window": window, **values}), SIZE).double()
    shake(model)
    return model


def encode_one(model: Recformer, tokens: np.ndarray, types: np.ndarray, items: np.ndarray) -> torch.Tensor:
    """All hidden vectors of one sequence."""
    layout = model.lay_out(Groups(((1, len(tokens)),)))
    token_LD = model.token_embedding(torch.from_numpy(tokens))
    x_LD = model.embed(token_LD, torch.from_numpy(types), torch.from_numpy(items), layout)
    return model.hidden(x_LD, layout)


def encode_each(model: Recformer, sequences: TokenSequences) -> list[torch.Tensor]:
    borders = sequences.offsets[1:-1]
    parts = (np.split(part, borders) for part in (sequences.tokens, sequences.types, sequences.item_positions))
    return [encode_one(model, *one) for one in zip(*parts, strict=True)]


def oracle(model: Recformer, batch: UserBatch) -> tuple[torch.Tensor, ...]:
    """Contrastive loss, and that of the language model on histories and on items."""
    sequences = item_sequences(batch, VOCABULARY.cls_id, CONFIG.max_items, CONFIG.max_tokens)
    vectors = torch.stack([hidden[0] for hidden in encode_each(model, sequences)])
    anchor, positive = F.normalize(vectors, dim=1).chunk(2)
    contrastive = F.cross_entropy(anchor @ positive.T / CONFIG.temperature, torch.arange(len(anchor)))
    masked = mask_words(sequences, sequence_keys(batch.user_keys, SEED, batch.step), VOCABULARY, LOSS.masking)
    hidden = torch.cat(encode_each(model, masked.sequences))[masked.positions]
    logits = model.head(hidden) @ model.output_matrix.T + model.head.bias
    losses = F.cross_entropy(logits, torch.from_numpy(masked.labels), reduction="none")
    is_item = torch.from_numpy(masked.positions >= sequences.offsets[len(batch.user_keys)])
    return contrastive, losses[~is_item].mean(), losses[is_item].mean()


@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(chunk_size=1), MemoryConfig(chunk_size=40)])
def test_loss_and_gradients_are_those_of_the_book(window: int | None, is_tied: bool, memory: MemoryConfig) -> None:
    model, batch = make_model(window, tie_embeddings=is_tied), make_batch()
    parts = oracle(model, batch)
    expected = parts[0] + 0.3 * (parts[1] + parts[2])
    loss, facts = RecformerObjective(model, VOCABULARY, LOSS, memory, seed=SEED)(batch)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    names = ("contrastive_loss", "masked_lm_loss", "masked_lm_item_loss")
    assert [facts[f"train/{name}"] for name in names] == pytest.approx([part.item() for part in parts])
    mine, theirs = (torch.autograd.grad(value, list(model.parameters())) for value in (loss, expected))
    for (name, _), one, other in zip(model.named_parameters(), mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11, msg=name)


def part_of_worker(rank: int, borders: list[int]) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    model, batch = make_model(), make_batch(*borders[rank : rank + 2])
    loss, facts = RecformerObjective(model, VOCABULARY, LOSS, seed=SEED)(batch)
    loss.backward()
    return loss.item(), facts, [p.grad for p in model.parameters() if p.grad is not None]


def test_two_workers_have_the_loss_and_the_gradient_of_one() -> None:
    expected, expected_facts, gradients = part_of_worker(0, [0, NUM_USERS])
    losses, facts, parts = zip(*run_ranks(part_of_worker, 2, [0, 2, NUM_USERS]), strict=True)
    assert np.mean(losses) == pytest.approx(expected, rel=1e-12)
    for name in expected_facts:
        if name != "train/chunk_size":
            assert np.mean([one[name] for one in facts]) == pytest.approx(expected_facts[name], rel=1e-12), name
    for one, other, whole in zip(*parts, gradients, strict=True):
        torch.testing.assert_close((one + other) / 2, whole, rtol=0, atol=1e-12)


def test_metrics_describe_the_batch() -> None:
    batch = make_batch()
    _, facts = RecformerObjective(make_model(), VOCABULARY, LOSS, MemoryConfig(chunk_size=40), seed=SEED)(batch)
    sequences = item_sequences(batch, VOCABULARY.cls_id, CONFIG.max_items, CONFIG.max_tokens)
    assert facts["train/tokens"] == len(sequences.tokens)
    assert 0 < facts["train/masked_tokens"] < 0.5 * len(sequences.tokens)
    assert facts["train/negatives"] == NUM_USERS - 1
    assert facts["train/chunk_size"] == 40


def test_users_with_the_same_next_item_are_no_negatives_where_that_is_asked_for() -> None:
    model, batch = make_model(), make_batch()
    same = replace(batch, item_keys=np.zeros_like(batch.item_keys))
    shared = LOSS.model_copy(update={"mask_shared_items": True})
    _, facts = RecformerObjective(model, VOCABULARY, shared, seed=SEED)(same)
    assert facts["train/negatives"] == 0
    assert facts["train/contrastive_loss"] == pytest.approx(0)
    _, facts = RecformerObjective(model, VOCABULARY, LOSS, seed=SEED)(same)
    assert facts["train/negatives"] == NUM_USERS - 1


def test_another_step_masks_other_words() -> None:
    objective = RecformerObjective(make_model(), VOCABULARY, LOSS, seed=SEED)
    (one, first), (other, second) = (objective(replace(make_batch(), step=step)) for step in (0, 1))
    assert first["train/contrastive_loss"] == second["train/contrastive_loss"]
    assert first["train/masked_lm_loss"] != second["train/masked_lm_loss"]


def test_bfloat16_is_near_float32_and_leaves_weights_and_gradients_in_float32() -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        model = make_model().float()
        loss, _ = RecformerObjective(model, VOCABULARY, LOSS, precision=precision, seed=SEED)(make_batch())
        loss.backward()
        losses.append(loss.item())
        assert loss.dtype == torch.float32
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("chunk_size", [1, 50, 2048])
def test_vectors_are_those_of_each_sequence_alone(chunk_size: int) -> None:
    model, batch = make_model(), make_batch()
    sequences = item_sequences(batch, VOCABULARY.cls_id, CONFIG.max_items, CONFIG.max_tokens)
    expected = torch.stack([F.normalize(hidden[0], dim=0) for hidden in encode_each(model, sequences)])
    torch.testing.assert_close(encode_sequences(model, sequences, chunk_size), expected.detach(), rtol=0, atol=1e-12)
