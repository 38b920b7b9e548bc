"""How a memory budget cuts a batch of token sequences; that cutting changes nothing."""

import numpy as np
import pytest
import torch

from tests.support.histories import random_histories
from tests.support.pretrained import shake
from userrep.data.item_sequences import TokenSequences, item_sequences
from userrep.data.vocabulary import Vocabulary
from userrep.data.word_masking import MaskedSequences, MaskingConfig, mask_words
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.encoding import ChunkPlan, MemoryConfig
from userrep.training.recformer_encoding import RecformerPlanner, encode_for_training

CONFIG = RecformerConfig(dim=64, num_heads=2, mlp_dim=64, window=8, max_items=9, max_tokens=90)
NOTHING = np.zeros(50, dtype=bool)
VOCABULARY = Vocabulary(50, 48, 49, 0, NOTHING, ~NOTHING)


def make(num_histories: int = 20) -> tuple[Recformer, TokenSequences, MaskedSequences]:
    torch.manual_seed(0)
    model = Recformer(CONFIG, VOCABULARY.size).double()
    shake(model)
    sequences = item_sequences(random_histories(num_histories, 30, 9, 12, 48, seed=0), VOCABULARY.cls_id, 9, 90)
    keys = np.arange(num_histories).astype(np.uint64)
    return model, sequences, mask_words(sequences, keys, VOCABULARY, MaskingConfig())


@pytest.mark.parametrize("plan", [ChunkPlan(1, 2), ChunkPlan(200, 3), ChunkPlan(200, 99)])
def test_chunks_change_nothing(plan: ChunkPlan) -> None:
    model, sequences, masked = make()
    expected, features, order = encode_for_training(model, sequences, masked, ChunkPlan(10**9, 2))
    received, others, other_order = encode_for_training(model, sequences, masked, plan)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-12)
    assert sorted(order.tolist()) == list(range(len(masked.positions)))
    torch.testing.assert_close(others[np.argsort(other_order)], features[np.argsort(order)], rtol=0, atol=1e-12)


def test_more_memory_keeps_more_graphs() -> None:
    model, sequences, _ = make(num_histories=400)
    small, large = (RecformerPlanner(model, MemoryConfig(budget_mib=mib)) for mib in (64, 4096))
    assert small.plan(sequences).chunk_size <= large.plan(sequences).chunk_size
    assert small.plan(sequences).num_kept < large.plan(sequences).num_kept
    assert "budget 64 MiB for activations of" in small.describe()
    assert RecformerPlanner(model, MemoryConfig(chunk_size=7)).plan(sequences).chunk_size == 7
