"""Weights of Recformer from Longformer, RoBERTa or BERT, as transformers and the official code name them.

Source: Recformer (arXiv 2305.13731, section 3.1.3) starts from allenai/longformer-base-4096, except the embeddings of
token types and item positions, which start at random. Differs: RoBERTa and BERT can be read too; with a window, their
global projections start as the local ones, as Longformer's did (arXiv 2004.05150, section 5).
"""

from collections.abc import Mapping
from typing import Any

import torch

from userrep.config import ConfigError
from userrep.models.recformer import NUM_TYPES, Recformer, RecformerConfig

# model_type of a checkpoint -> rows of its position table before the first token's.
POSITION_OFFSETS = {"longformer": 2, "roberta": 2, "bert": 0}
HEADS = {"lm_head.": ("dense", "layer_norm"), "cls.predictions.": ("transform.dense", "transform.LayerNorm")}
LAYER_PARTS = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp_in": "intermediate.dense",
    "mlp_out": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def from_longformer(state: Mapping[str, torch.Tensor], config: RecformerConfig) -> dict[str, torch.Tensor]:
    """State of a `Recformer` from that of the official class, or of Longformer, RoBERTa or BERT with its head.

    Args:
        state: weights by the names of transformers, `longformer.` (`roberta.`, `bert.`) and `lm_head.` (`cls.`).
        config: of the model; position, type and item tables are cut to the rows that it uses.

    Returns:
        All but the type and item embeddings, where `state` is no Recformer's.

    Raises:
        ConfigError: the position table is shorter than max_tokens.
    """
    prefix = next(name.split(".")[0] for name in state if ".encoder.layer.0." in name)
    embeddings, offset = f"{prefix}.embeddings.", config.position_offset
    positions = state[embeddings + "position_embeddings.weight"]
    if len(positions) < config.max_tokens + offset:
        raise ConfigError(
            f"max_tokens={config.max_tokens}, and the backbone knows {len(positions) - offset} positions: lower it"
        )
    ours = {
        "token_embedding.weight": state[embeddings + "word_embeddings.weight"],
        "position_embedding.weight": positions[: config.max_tokens + offset],
        **_both("embedding_norm", embeddings + "LayerNorm", state),
    }
    items = embeddings + "item_position_embeddings.weight"
    if items in state:
        ours["item_embedding.weight"] = state[items][: config.max_items + 1]
        ours["type_embedding.weight"] = state[embeddings + "token_type_embeddings.weight"][:NUM_TYPES]
    for number in range(config.num_layers):
        ours |= _layer(state, f"{prefix}.encoder.layer.{number}.", f"layers.{number}.", config.window is not None)
    return ours | _head(state, ours["token_embedding.weight"], config.tie_embeddings)


def load_backbone(name: str, config: RecformerConfig | None = None) -> Recformer:
    """A Recformer that starts from a pretrained backbone.

    Args:
        name: local folder or hub name of a Longformer, RoBERTa or BERT with its masked language model head.
        config: window, limits and temperature; width, layers, heads, MLP and position offset are the backbone's.
            Default: a window of 64, and as many tokens as the backbone knows positions, at most 1,024.

    Raises:
        ConfigError: it cannot be loaded, is another kind of model, or knows fewer positions than max_tokens.
    """
    from transformers import AutoConfig, AutoModelForMaskedLM  # imported here: it takes seconds

    try:
        theirs = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"backbone {name!r} is no folder or hub name of a model: {error}") from error
    if theirs.model_type not in POSITION_OFFSETS:
        raise ConfigError(f"backbone {name!r} is a {theirs.model_type}: give one of {', '.join(POSITION_OFFSETS)}")
    try:
        state = AutoModelForMaskedLM.from_pretrained(name, dtype=torch.float32).state_dict()
    except (OSError, ValueError) as error:
        raise ConfigError(f"weights of backbone {name!r} cannot be loaded: {error}") from error
    shape = backbone_shape(theirs, config)
    model = Recformer(shape, theirs.vocab_size)
    model.load_state_dict(from_longformer(state, shape), strict=False)
    return model


def backbone_shape(theirs: Any, config: RecformerConfig | None = None) -> RecformerConfig:
    """Config of a Recformer on a backbone.

    Args:
        theirs: config of transformers.
        config: as in `load_backbone`.
    """
    if theirs.hidden_act != "gelu":
        raise ConfigError(f"the backbone has the activation {theirs.hidden_act}: only one with gelu can be used")
    offset = POSITION_OFFSETS[theirs.model_type]
    if config is None:
        num_positions = theirs.max_position_embeddings - offset
        config = RecformerConfig(max_tokens=min(RecformerConfig().max_tokens, num_positions))
    return config.model_copy(
        update={
            "dim": theirs.hidden_size,
            "num_layers": theirs.num_hidden_layers,
            "num_heads": theirs.num_attention_heads,
            "mlp_dim": theirs.intermediate_size,
            "norm_eps": theirs.layer_norm_eps,
            "position_offset": offset,
        }
    )


def _layer(state: Mapping[str, torch.Tensor], theirs: str, ours: str, has_global: bool) -> dict[str, torch.Tensor]:
    found = {}
    attention = theirs + "attention.self."
    for part in ("weight", "bias"):
        local = {name: state[f"{attention}{name}.{part}"] for name in ("query", "key", "value")}
        found[f"{ours}query_key_value.{part}"] = torch.cat(list(local.values()))
        if has_global:
            for name, value in local.items():
                found[f"{ours}{name}_global.{part}"] = state.get(f"{attention}{name}_global.{part}", value)
    for mine, other in LAYER_PARTS.items():
        found |= _both(ours + mine, theirs + other, state)
    return found


def _head(state: Mapping[str, torch.Tensor], embedding: torch.Tensor, is_tied: bool) -> dict[str, torch.Tensor]:
    prefix = next(prefix for prefix in HEADS if any(name.startswith(prefix) for name in state))
    dense, norm = HEADS[prefix]
    found = {**_both("head.dense", prefix + dense, state), **_both("head.norm", prefix + norm, state)}
    if not is_tied:
        found["head.decoder"] = state.get(prefix + "decoder.weight", embedding)
    return {**found, "head.bias": state[prefix + "bias"]}


def _both(ours: str, theirs: str, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{ours}.{part}": state[f"{theirs}.{part}"] for part in ("weight", "bias")}
