"""Weights of Longformer, RoBERTa and BERT, against their own forward pass in transformers."""

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    LongformerConfig,
    LongformerForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from tests.support.pretrained import shake
from userrep.config import ConfigError
from userrep.models.packing import Groups
from userrep.models.recformer import RecformerConfig
from userrep.models.recformer_weights import load_backbone

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 34,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FIRST_LENGTHS = (7, 23)


def save(model: torch.nn.Module, directory: Path) -> torch.nn.Module:
    shake(model)
    model.eval().save_pretrained(directory)  # pyright: ignore
    return model


def logits(name: str, config: RecformerConfig, tokens: list[torch.Tensor]) -> torch.Tensor:
    """Of a loaded backbone; the embeddings that it lacks are set to what adds nothing."""
    model = load_backbone(name, config)
    torch.nn.init.zeros_(model.item_embedding.weight)
    torch.nn.init.zeros_(model.type_embedding.weight)
    layout = model.lay_out(Groups(tuple((1, len(one)) for one in tokens)))
    zeros = torch.zeros(len(layout.indices), dtype=torch.int64)
    x_PD = model.embed(model.token_embedding(torch.cat(tokens)), zeros, zeros, layout)
    return model.head(model.hidden(x_PD, layout)) @ model.output_matrix.T + model.head.bias


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randint(3, 50, (length,)) for length in FIRST_LENGTHS]


def test_a_longformer_computes_what_it_did(tmp_path: Path, tokens: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    theirs = save(
        LongformerForMaskedLM(LongformerConfig(attention_window=[6, 6], type_vocab_size=1, **SHAPE)), tmp_path
    )
    torch.nn.init.zeros_(theirs.longformer.embeddings.token_type_embeddings.weight)
    expected = []
    for one in tokens:
        is_global = torch.zeros(1, len(one), dtype=torch.int64)
        is_global[0, 0] = 1
        expected.append(theirs(one[None], global_attention_mask=is_global).logits[0])
    received = logits(str(tmp_path), RecformerConfig(window=6, max_tokens=32), tokens)
    torch.testing.assert_close(received, torch.cat(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config_class", "model_class", "max_tokens"),
    [(BertConfig, BertForMaskedLM, 34), (RobertaConfig, RobertaForMaskedLM, 32)],
)
def test_full_attention_computes_what_it_did(
    tmp_path: Path, tokens: list[torch.Tensor], config_class: type, model_class: type, max_tokens: int
) -> None:
    torch.manual_seed(0)
    theirs = save(model_class(config_class(pad_token_id=1, **SHAPE)), tmp_path)
    torch.nn.init.zeros_(theirs.base_model.embeddings.token_type_embeddings.weight)
    expected = [theirs(one[None]).logits[0] for one in tokens]
    received = logits(str(tmp_path), RecformerConfig(window=None, max_tokens=max_tokens), tokens)
    torch.testing.assert_close(received, torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_global_projections_of_a_roberta_start_as_its_local_ones(tmp_path: Path) -> None:
    save(RobertaForMaskedLM(RobertaConfig(pad_token_id=1, **SHAPE)), tmp_path)
    model = load_backbone(str(tmp_path))
    assert (model.config.window, model.config.max_tokens, model.config.dim) == (64, 32, 8)
    for layer in model.layers:
        for part, name in zip(layer.query_key_value.weight.chunk(3), ("query", "key", "value"), strict=True):
            assert torch.equal(getattr(layer, f"{name}_global").weight, part)


def test_what_cannot_be_a_backbone_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder or hub name"):
        load_backbone(str(tmp_path / "absent"))
    save(RobertaForMaskedLM(RobertaConfig(pad_token_id=1, **SHAPE)), tmp_path / "roberta")
    with pytest.raises(ConfigError, match="knows 32 positions"):
        load_backbone(str(tmp_path / "roberta"), RecformerConfig(max_tokens=33))
    save(RobertaForMaskedLM(RobertaConfig(pad_token_id=1, **{**SHAPE, "hidden_act": "relu"})), tmp_path / "relu")
    with pytest.raises(ConfigError, match="activation relu"):
        load_backbone(str(tmp_path / "relu"))
    small = DistilBertForMaskedLM(DistilBertConfig(vocab_size=50, dim=8, n_layers=1, n_heads=2, hidden_dim=8))
    save(small, tmp_path / "distilbert")
    with pytest.raises(ConfigError, match="is a distilbert"):
        load_backbone(str(tmp_path / "distilbert"))
