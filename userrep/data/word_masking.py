"""Which tokens are to be guessed: whole words of a share of each sequence, drawn for the user, the step and the side.

Source: whole-word masking as in BERT, and in AaronHeee/RecFormer, collator.py: words in random order, those longer than
what is left of the budget are skipped, so the share of masked tokens is met as nearly as words allow. Differs: a word
crosses no border of a key, a value or an item, and no random replacement is a special token (both as there with
`is_compatible`); draws are a function of the user, not of a place in the batch.

Legend: `B` samples, `H` sequences, `P` their tokens, `W` words, `M` masked tokens.
"""

from dataclasses import dataclass, replace

import numpy as np
from pydantic import Field

from userrep.config import Config
from userrep.data.item_sequences import CLS_TYPE, TokenSequences
from userrep.data.split import mix, unit_interval
from userrep.data.vocabulary import Vocabulary

ORDER, ACTION, REPLACEMENT = 0, 1, 2  # purposes of random numbers, as seeds of `mix`


class MaskingConfig(Config):
    """How much is masked, and by what."""

    share: float = Field(default=0.15, gt=0, le=1)  # of a sequence's tokens, at least one token
    mask_share: float = Field(default=0.8, ge=0, le=1)  # of the masked: become the mask token
    random_share: float = Field(default=0.1, ge=0, le=1)  # of the masked: become any token; the rest stays as it is
    is_compatible: bool = False  # words cross borders, special tokens are replacements: as the official code


@dataclass(frozen=True)
class MaskedSequences:
    """Sequences of which some tokens are hidden.

    Attributes:
        sequences: as they are shown.
        positions: of the tokens to be guessed, ascending, int64 (M,).
        labels: what they were, int64 (M,).
    """

    sequences: TokenSequences
    positions: np.ndarray
    labels: np.ndarray


def sequence_keys(user_keys: np.ndarray, seed: int, step: int) -> np.ndarray:
    """Seeds of the sequences of a batch, uint64 (2 B,): of all anchors, then of all positives.

    Args:
        user_keys: 64-bit keys of the users, (B,).
        seed: of the run, >= 0.
        step: of the run, >= 0.
    """
    of_step = mix(mix(user_keys.view(np.uint64), seed), step)
    return np.concatenate([mix(of_step, side) for side in (0, 1)])


def mask_words(
    sequences: TokenSequences, keys_H: np.ndarray, vocabulary: Vocabulary, config: MaskingConfig
) -> MaskedSequences:
    """Hides whole words.

    Args:
        sequences: what is to be masked. [CLS] never is.
        keys_H: seed of each sequence, uint64; with its tokens, it alone decides.
        vocabulary: of the tokens.
        config: how much, and by what.
    """
    lengths_H = np.diff(sequences.offsets)
    starts = _word_starts(sequences, vocabulary, config.is_compatible)
    is_word = sequences.types != CLS_TYPE
    word_P = np.cumsum(starts) - 1  # of [CLS]: whatever the last word before it is
    history_P = np.repeat(np.arange(len(lengths_H)), lengths_H)
    size_W = np.bincount(word_P[is_word], minlength=int(starts.sum()))
    budget_H = np.maximum(1, np.rint(config.share * _counted(lengths_H, config))).astype(np.int64)
    is_chosen_W = _choose(history_P[starts], size_W, budget_H, keys_H)
    is_masked = is_word.copy()
    is_masked[is_word] = is_chosen_W[word_P[is_word]]

    positions = np.flatnonzero(is_masked)
    history_M = history_P[positions]
    key_M = keys_H[history_M] + (positions - sequences.offsets[history_M]).astype(np.uint64)
    luck_M, labels = unit_interval(key_M, ACTION), sequences.tokens[positions]
    allowed = np.arange(vocabulary.size) if config.is_compatible else np.flatnonzero(~vocabulary.is_special)
    random_M = allowed[(mix(key_M, REPLACEMENT) % np.uint64(len(allowed))).astype(np.int64)]
    shown_M = np.where(luck_M < config.mask_share + config.random_share, random_M, labels)
    shown_M = np.where(luck_M < config.mask_share, vocabulary.mask_id, shown_M)
    tokens = sequences.tokens.copy()
    tokens[positions] = shown_M
    return MaskedSequences(replace(sequences, tokens=tokens), positions, labels)


def _counted(lengths_H: np.ndarray, config: MaskingConfig) -> np.ndarray:
    return lengths_H if config.is_compatible else lengths_H - 1


def _word_starts(sequences: TokenSequences, vocabulary: Vocabulary, is_compatible: bool) -> np.ndarray:
    """Whether a token begins a word, bool (P,); [CLS] does not, what follows it does."""
    tokens, types, items = sequences.tokens, sequences.types, sequences.item_positions
    is_cls = types == CLS_TYPE
    starts = vocabulary.is_word_start[tokens]
    starts[1:] |= is_cls[:-1]
    if not is_compatible:
        starts[1:] |= (types[1:] != types[:-1]) | (items[1:] != items[:-1])
    return starts & ~is_cls


def _choose(history_W: np.ndarray, size_W: np.ndarray, budget_H: np.ndarray, keys_H: np.ndarray) -> np.ndarray:
    """Goes through each history's words in random order and takes those that fit into what is left of its budget.

    Args:
        history_W: of each word, ascending.
        size_W: tokens of each word.
        budget_H: tokens to take of each history.
        keys_H: seeds.

    Returns:
        Whether a word was taken, bool (W,).
    """
    first_H = np.searchsorted(history_W, np.arange(len(budget_H)))
    luck_W = unit_interval(
        keys_H[history_W] + (np.arange(len(history_W)) - first_H[history_W]).astype(np.uint64), ORDER
    )
    open_W = np.lexsort((luck_W, history_W))
    left_H, is_chosen_W = budget_H.copy(), np.zeros(len(history_W), dtype=bool)
    # Every round takes words up to the first that does not fit. What is left only shrinks, so a word that does not fit
    # now never will: it is dropped, and rounds are few.
    while True:
        open_W = open_W[(size_W[open_W] <= left_H[history_W[open_W]]) & ~is_chosen_W[open_W]]
        if not len(open_W):
            return is_chosen_W
        history, total = history_W[open_W], np.cumsum(size_W[open_W])
        is_first = np.concatenate([[True], history[1:] != history[:-1]])
        before = np.repeat(
            (total - size_W[open_W])[is_first], np.diff(np.append(np.flatnonzero(is_first), len(history)))
        )
        taken = open_W[total - before <= left_H[history]]
        is_chosen_W[taken] = True
        left_H -= np.bincount(history_W[taken], size_W[taken], minlength=len(left_H)).astype(np.int64)
