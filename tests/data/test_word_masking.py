"""Masking of whole words against a loop; what it never masks; on what it depends."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.histories import random_histories
from userrep.data.item_sequences import TokenSequences, item_sequences
from userrep.data.split import unit_interval
from userrep.data.vocabulary import Vocabulary
from userrep.data.word_masking import ORDER, MaskingConfig, mask_words, sequence_keys

SIZE, CLS_ID, MASK_ID = 50, 48, 49
VOCABULARY = Vocabulary(
    size=SIZE,
    cls_id=CLS_ID,
    mask_id=MASK_ID,
    unknown_id=0,
    is_special=np.isin(np.arange(SIZE), [0, CLS_ID, MASK_ID]),
    is_word_start=np.arange(SIZE) % 3 == 0,
)


def make(num_histories: int, seed: int, max_tokens: int = 60) -> TokenSequences:
    return item_sequences(random_histories(num_histories, 6, 6, 9, 48, seed), CLS_ID, 5, max_tokens)


def words_of(sequences: TokenSequences, history: int, is_compatible: bool) -> list[list[int]]:
    words: list[list[int]] = []
    start, stop = sequences.offsets[history : history + 2].tolist()
    for place in range(start + 1, stop):
        border = any(part[place] != part[place - 1] for part in (sequences.types, sequences.item_positions))
        is_start = VOCABULARY.is_word_start[sequences.tokens[place]] or (border and not is_compatible)
        if is_start or not words:
            words.append([])
        words[-1].append(place)
    return words


def loop(sequences: TokenSequences, keys: np.ndarray, config: MaskingConfig) -> list[int]:
    chosen: list[int] = []
    for history, key in enumerate(keys):
        words = words_of(sequences, history, config.is_compatible)
        luck = unit_interval(key + np.arange(len(words), dtype=np.uint64), ORDER)
        num_tokens = int(np.diff(sequences.offsets)[history]) - (not config.is_compatible)
        left = max(1, round(config.share * num_tokens))
        for number in np.argsort(luck):
            if len(words[number]) <= left:
                left -= len(words[number])
                chosen += words[number]
    return sorted(chosen)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 7), st.integers(0, 99), st.integers(1, 60), st.booleans(), st.sampled_from([0.15, 0.5, 1.0]))
def test_words_are_those_of_a_loop(num: int, seed: int, max_tokens: int, is_compatible: bool, share: float) -> None:
    sequences, config = make(num, seed, max_tokens), MaskingConfig(share=share, is_compatible=is_compatible)
    keys = np.random.default_rng(seed).integers(0, 2**63, num).astype(np.uint64)
    found = mask_words(sequences, keys, VOCABULARY, config)
    assert found.positions.tolist() == loop(sequences, keys, config)
    assert found.labels.tolist() == sequences.tokens[found.positions].tolist()
    untouched = np.delete(np.arange(len(sequences.tokens)), found.positions)
    assert np.array_equal(found.sequences.tokens[untouched], sequences.tokens[untouched])
    assert np.all(sequences.types[found.positions] != 0)


@pytest.mark.parametrize("is_compatible", [False, True])
def test_masked_tokens_are_hidden_replaced_or_kept(is_compatible: bool) -> None:
    sequences = make(400, 0)
    keys = sequence_keys(np.arange(200), seed=0, step=0)
    found = mask_words(sequences, keys, VOCABULARY, MaskingConfig(is_compatible=is_compatible))
    shown, num_masked = found.sequences.tokens[found.positions], len(found.positions)
    counted = len(sequences.tokens) - (0 if is_compatible else 400)
    assert num_masked == pytest.approx(0.15 * counted, rel=0.05)
    assert np.mean(shown == MASK_ID) == pytest.approx(0.8, abs=0.05)
    assert np.mean(shown == found.labels) == pytest.approx(0.1, abs=0.04)
    replaced = shown[(shown != MASK_ID) & (shown != found.labels)]
    assert len(np.unique(replaced)) > 20
    assert np.any(VOCABULARY.is_special[replaced]) == is_compatible


def test_what_is_masked_depends_on_user_step_side_and_seed_and_on_no_place() -> None:
    users, sequences = np.array([7, -5, 9]), make(6, 3)
    keys = sequence_keys(users, seed=1, step=4)
    assert len(np.unique(keys)) == 6
    assert np.array_equal(sequence_keys(users[[1]], seed=1, step=4), keys[[1, 4]])
    for other in (sequence_keys(users, seed=2, step=4), sequence_keys(users, seed=1, step=5)):
        assert not np.any(np.isin(other, keys))
    whole = mask_words(sequences, keys, VOCABULARY, MaskingConfig())
    start, stop = sequences.offsets[4:6]
    alone = replace(
        sequences,
        **{name: getattr(sequences, name)[start:stop] for name in ("tokens", "types", "item_positions")},
        offsets=np.array([0, stop - start]),
    )
    found = mask_words(alone, keys[4:5], VOCABULARY, MaskingConfig())
    assert np.array_equal(found.sequences.tokens, whole.sequences.tokens[start:stop])


def test_sequences_without_words_have_nothing_to_mask() -> None:
    sequences = make(3, 0, max_tokens=1)
    found = mask_words(sequences, np.arange(3).astype(np.uint64), VOCABULARY, MaskingConfig())
    assert len(found.positions) == len(found.labels) == 0
