"""Item attributes -> tokens, of which those of an attribute's key are flagged.

Source: Recformer, Li et al., KDD 2023 (arXiv 2305.13731, section 2.1): an item is the sentence of its attributes, key,
value, key, value. Differs: in the `separated` form, the default, every key and every value begins a word of its own;
`compatible` is the form of AaronHeee/RecFormer, where words of neighbouring attributes and items run into each other.

Legend: `U` items, `T` their tokens.
"""

from collections.abc import Sequence
from itertools import chain, islice
from typing import Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

from userrep.config import Config
from userrep.data.vocabulary import Vocabulary

KEY_FLAG = 1 << 30  # set in the tokens of keys; no vocabulary is so large

Attributes = Sequence[tuple[str, Sequence[str]]]  # (key, its values), in order; key "" where there is none


class KeyValueConfig(Config):
    """How much of an item is read, and how its attributes are put together."""

    max_attributes: int = Field(default=3, ge=1)  # of an item, the first so many
    max_attribute_tokens: int = Field(default=32, ge=1)  # of key and value together, from the left
    form: Literal["separated", "compatible"] = "separated"  # compatible: as the official code, for its checkpoints


class KeyValueTokenizer:
    """Tokenizes the attributes of items. Keys are tokenized once."""

    def __init__(self, tokenizer: Tokenizer, config: KeyValueConfig) -> None:
        """Args: tokenizer is not changed; its own truncation and padding are not used."""
        self.vocabulary, self.config = Vocabulary.of(tokenizer), config
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(config.max_attribute_tokens)
        self._prefix = " " if config.form == "separated" and self._lacks_space() else ""
        self._keys: dict[str, list[int]] = {"": []}

    def __call__(self, items: Sequence[Attributes]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of items.

        Args:
            items: attributes of each. Values of a key are joined by a space.

        Returns:
            Tokens of all items, one after another, int32 (T,), those of keys with `KEY_FLAG`; and borders of the items,
            int32 (U + 1,). An item without any token gets the unknown token, so that none is empty.
        """
        limit = self.config.max_attribute_tokens
        chosen = [list(islice(attributes, self.config.max_attributes)) for attributes in items]
        keys = list(chain.from_iterable([key for key, _ in attributes] for attributes in chosen))
        values = self._encode([" ".join(values) for attributes in chosen for _, values in attributes])
        known = self._key_tokens(keys)
        parts = iter([(known[key] + value)[:limit] for key, value in zip(keys, values, strict=True)])
        tokens = [
            list(chain.from_iterable(islice(parts, len(attributes)))) or [self.vocabulary.unknown_id]
            for attributes in chosen
        ]
        offsets = np.zeros(len(tokens) + 1, dtype=np.int32)
        np.cumsum([len(one) for one in tokens], out=offsets[1:])
        return np.fromiter(chain.from_iterable(tokens), dtype=np.int32, count=int(offsets[-1])), offsets

    def _key_tokens(self, keys: list[str]) -> dict[str, list[int]]:
        new = [key for key in dict.fromkeys(keys) if key not in self._keys]
        for key, tokens in zip(new, self._encode(new), strict=True):
            self._keys[key] = [token | KEY_FLAG for token in tokens]
        return self._keys

    def _encode(self, texts: list[str]) -> list[list[int]]:
        prefixed = [self._prefix + text if text else text for text in texts]
        return [one.ids for one in self._tokenizer.encode_batch_fast(prefixed, add_special_tokens=False)]

    def _lacks_space(self) -> bool:
        """Whether the first word of a text is tokenized as if it went on with another one."""
        tokens = self._tokenizer.encode("a", add_special_tokens=False).ids
        return bool(tokens) and not self.vocabulary.is_word_start[tokens[0]]
