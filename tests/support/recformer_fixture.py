"""The official RecFormer code's numbers, in this package's modules."""

import json
from functools import cache

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.support.shared_data import shared_path
from userrep.data.item_sequences import TokenSequences
from userrep.models.packing import pack
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.models.recformer_weights import from_longformer

CONFIG = RecformerConfig(
    dim=16, num_layers=2, num_heads=2, mlp_dim=32, window=4, max_items=5, max_tokens=40, position_offset=2
)
SIDES = ("a", "b")


@cache
def load_fixture() -> dict[str, torch.Tensor]:
    """All tensors of the fixture; skips the test where it is absent."""
    return load_file(shared_path("parity/recformer/recformer_fixture.safetensors"))


def under(prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose name begins so, by the rest of it."""
    return {name.removeprefix(prefix): value for name, value in load_fixture().items() if name.startswith(prefix)}


def official_model(dtype: torch.dtype) -> Recformer:
    """The model with the fixture's weights."""
    model = Recformer(CONFIG, 100)
    model.load_state_dict(from_longformer(under("weights/"), CONFIG))
    return model.to(dtype)


def official_gradients(precision: str) -> dict[str, torch.Tensor]:
    """Gradients by our names."""
    return from_longformer(under(f"{precision}/grad/"), CONFIG)


def official_sequences(side: str, is_masked: bool = False) -> TokenSequences:
    """Token sequences of the batch: histories `a` or next items `b`."""
    batch = under("batch/")
    is_real = batch[f"attention_mask_{side}"].bool()
    tokens, types, items = (
        batch[f"{name}_{side}"][is_real].numpy()
        for name in ("mlm_input_ids" if is_masked else "input_ids", "token_type_ids", "item_position_ids")
    )
    return TokenSequences(tokens, types, items, np.concatenate([[0], is_real.sum(1).cumsum(0)]))


def rows_of(padded: torch.Tensor, side: str) -> torch.Tensor:
    """Rows of a padded tensor (4, L, ...) that are no padding."""
    return padded[load_fixture()[f"batch/attention_mask_{side}"].bool()]


def embed(model: Recformer, sequences: TokenSequences) -> tuple[torch.Tensor, object, np.ndarray, np.ndarray]:
    """Input vectors sorted by length; their layout; place of each sorted token, and of each sorted sequence."""
    packed = pack(sequences.offsets)
    layout = model.lay_out(packed.chunks[0].groups)
    tokens, types, items = (
        torch.from_numpy(part[packed.positions])
        for part in (sequences.tokens, sequences.types, sequences.item_positions)
    )
    return model.embed(model.token_embedding(tokens), types, items, layout), layout, packed.positions, packed.order


@cache
def official_tokenizer() -> Tokenizer:
    """The fixture's byte-level BPE, as RoBERTa's."""
    folder = shared_path("parity/recformer/tok")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([name for name in json.loads((folder / "vocab.json").read_text()) if name[0] == "<"])
    return tokenizer
