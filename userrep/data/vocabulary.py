"""What a model must know of a tokenizer's ids: which begin a word, which are special, which stand for what.

Legend: `V` token ids.
"""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

CLS_TOKENS = ("<s>", "[CLS]", "<cls>")
MASK_TOKENS = ("<mask>", "[MASK]")
UNKNOWN_TOKENS = ("<unk>", "[UNK]", "<pad>", "[PAD]")
SPACE_MARKERS = ("\u0120", "\u2581")  # of byte-level BPE, and of sentencepiece
CONTINUATION = "##"  # of WordPiece


@dataclass(frozen=True)
class Vocabulary:
    """Token ids of a tokenizer.

    Attributes:
        size: rows of an embedding, V: ids of the tokenizer, and those that it lacks behind them.
        cls_id: begins a sequence.
        mask_id: stands for a token that is to be guessed.
        unknown_id: of an item without a token; the tokenizer's unknown token, else its pad, else id 0.
        is_special: tokens that stand for no text, bool (V,).
        is_word_start: tokens that begin a word, bool (V,), as `word_starts` tells.
    """

    size: int
    cls_id: int
    mask_id: int
    unknown_id: int
    is_special: np.ndarray
    is_word_start: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Vocabulary":
        """Reads a tokenizer. Where it has no token for [CLS] or [MASK], an id is added behind its own."""
        starts = word_starts(tokenizer)
        size, cls_id, mask_id = len(starts), _first_id(tokenizer, CLS_TOKENS), _first_id(tokenizer, MASK_TOKENS)
        if cls_id is None:
            cls_id, size = size, size + 1
        if mask_id is None:
            mask_id, size = size, size + 1
        is_special = np.zeros(size, dtype=bool)
        is_special[[number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special]] = True
        is_special[[cls_id, mask_id]] = True
        added = np.ones(size - len(starts), dtype=bool)
        unknown_id = _first_id(tokenizer, UNKNOWN_TOKENS) or 0
        return cls(size, cls_id, mask_id, unknown_id, is_special, np.concatenate([starts, added]))


def read_vocabulary(path: Path) -> Vocabulary:
    """That of a tokenizer.json."""
    return Vocabulary.of(Tokenizer.from_file(str(path)))


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Tokens that begin a word, bool (V,): those with a leading space, and those whose first character is punctuation.

    A leading space is the marker of byte-level BPE or sentencepiece; in WordPiece every token without `##` has one.

    Source: whole-word masking of BERT and its use on RoBERTa's tokens in AaronHeee/RecFormer, collator.py.
    Differs: reads WordPiece and sentencepiece too.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    is_word_piece = type(tokenizer.model).__name__ == "WordPiece"
    starts_V = np.zeros(max(vocabulary.values()) + 1, dtype=bool)
    for token, number in vocabulary.items():
        if is_word_piece:
            starts_V[number] = not token.startswith(CONTINUATION)
        else:
            starts_V[number] = token.startswith(SPACE_MARKERS) or _is_punctuation(token[:1])
    return starts_V


def _is_punctuation(character: str) -> bool:
    if not character:
        return False
    # ASCII symbols such as $ and ^ count too, which Unicode files elsewhere.
    is_ascii_symbol = character.isascii() and character.isprintable() and not (character.isalnum() or character == " ")
    return is_ascii_symbol or unicodedata.category(character).startswith("P")


def _first_id(tokenizer: Tokenizer, tokens: tuple[str, ...]) -> int | None:
    numbers = (tokenizer.token_to_id(token) for token in tokens)
    return next((number for number in numbers if number is not None), None)
