"""Which tokens begin a word, and which ids stand for what, by tokenizers of all three kinds."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from userrep.data.tokenizer import TokenizeConfig, build_tokenizer
from userrep.data.vocabulary import Vocabulary, word_starts

BYTE_LEVEL = ["<s>", "<pad>", "</s>", "<unk>", "red", "\u0120red", "\u0120", ",", "$", "\u2019s", "3", "<mask>"]
SENTENCE_PIECE = ["<unk>", "\u2581red", "red", "\u2581", "."]
WORD_PIECE = ["[PAD]", "[UNK]", "[CLS]", "[MASK]", "red", "##red", ".", "##."]


def make(kind: str) -> Tokenizer:
    if kind == "word_piece":
        tokenizer = Tokenizer(models.WordPiece({token: n for n, token in enumerate(WORD_PIECE)}, unk_token="[UNK]"))
        tokenizer.add_special_tokens([token for token in WORD_PIECE if token[0] == "["])
        return tokenizer
    names = BYTE_LEVEL if kind == "byte_level" else SENTENCE_PIECE
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(names)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([token for token in names if token[0] == "<"])
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        (
            "byte_level",
            BYTE_LEVEL,
            {"\u0120red", "\u0120", ",", "$", "\u2019s", "<s>", "<pad>", "</s>", "<unk>", "<mask>"},
        ),
        ("sentence_piece", SENTENCE_PIECE, {"\u2581red", "\u2581", ".", "<unk>"}),
        ("word_piece", WORD_PIECE, {"[PAD]", "[UNK]", "[CLS]", "[MASK]", "red", "."}),
    ],
)
def test_words_start_at_spaces_and_punctuation(kind: str, names: list[str], expected: set[str]) -> None:
    starts = word_starts(make(kind))
    assert {name for name, is_start in zip(names, starts, strict=True) if is_start} == expected


def test_ids_of_a_pretrained_tokenizer_are_its_own() -> None:
    found = Vocabulary.of(make("byte_level"))
    assert (found.size, found.cls_id, found.mask_id, found.unknown_id) == (12, 0, 11, 3)
    assert found.is_special.nonzero()[0].tolist() == [0, 1, 2, 3, 11]
    found = Vocabulary.of(make("word_piece"))
    assert (found.size, found.cls_id, found.mask_id, found.unknown_id) == (8, 2, 3, 1)


def test_what_a_tokenizer_lacks_comes_behind_its_own_ids() -> None:
    tokenizer = build_tokenizer(TokenizeConfig(vocab_size=260), ["red shoe"])
    own = tokenizer.get_vocab_size()
    found = Vocabulary.of(tokenizer)
    assert (found.size, found.cls_id, found.mask_id, found.unknown_id) == (own + 2, own, own + 1, 0)
    assert len(found.is_word_start) == len(found.is_special) == found.size
    assert found.is_special.nonzero()[0].tolist() == [0, own, own + 1]
