"""Tokens of item attributes: the official code's cases, and whole words in the default form."""

import json
from typing import Any

import numpy as np
import pytest

from tests.support.recformer_fixture import official_tokenizer
from tests.support.shared_data import shared_path
from userrep.data.batch import HistoryBatch
from userrep.data.item_sequences import item_sequences
from userrep.data.key_values import KEY_FLAG, KeyValueConfig, KeyValueTokenizer
from userrep.data.tokenizer import TokenizeConfig, build_tokenizer

TEXTS = ["title red running shoe", "brand acme", "categories Beauty Hair Care", "a red shoe"]


def split(tokens: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, offsets[1:-1])]


def compatible(case: dict[str, Any]) -> KeyValueTokenizer:
    config = KeyValueConfig(
        max_attributes=case["max_attr_num"], max_attribute_tokens=case["max_attr_length"], form="compatible"
    )
    return KeyValueTokenizer(official_tokenizer(), config)


def official_cases() -> list[dict[str, Any]]:
    return json.loads(shared_path("parity/recformer/tokenization.json").read_text())


def attributes(item: dict[str, str]) -> list[tuple[str, list[str]]]:
    return [(key, [value]) for key, value in item.items()]


def test_items_are_tokenized_as_by_the_official_code() -> None:
    cases = [case for case in official_cases() if isinstance(case["output"], list)]
    assert len(cases) == 7
    for case in cases:
        tokens, _ = compatible(case)([attributes(case["input"])])
        expected_ids, expected_types = case["output"]
        assert (tokens & ~KEY_FLAG).tolist() == expected_ids, case["name"]
        assert np.where(tokens & KEY_FLAG, 1, 2).tolist() == expected_types, case["name"]


def test_histories_are_tokenized_as_by_the_official_code() -> None:
    cases = [case for case in official_cases() if isinstance(case["output"], dict)]
    assert len(cases) == 6
    for case in cases:
        histories, output = case["input"], case["output"]
        if not isinstance(output["input_ids"][0], list):
            histories, output = [histories], {name: [values] for name, values in output.items()}
        items = [attributes(item) for history in histories for item in history]
        tokens, offsets = compatible(case)(items)
        borders = np.cumsum([0, *map(len, histories)])
        batch = HistoryBatch(tokens, offsets, np.arange(len(items)), borders, np.arange(len(items)))
        found = item_sequences(batch, 0, case["max_item_embeddings"] - 1, case["max_token_num"])
        for name, array in (
            ("input_ids", found.tokens),
            ("token_type_ids", found.types),
            ("item_position_ids", found.item_positions),
        ):
            expected = [
                [value for value, is_real in zip(row, mask, strict=True) if is_real]
                for row, mask in zip(output[name], output["attention_mask"], strict=True)
            ]
            assert split(array, found.offsets) == expected, (case["name"], name)


def test_every_key_and_value_is_a_word_of_its_own() -> None:
    tokenizer = official_tokenizer()
    tokens, _ = KeyValueTokenizer(tokenizer, KeyValueConfig())([[("title", ["red", "mouse"]), ("brand", ["pad"])]])
    title, red, mouse, brand, pad = (
        tokenizer.encode(f" {word}").ids for word in ("title", "red", "mouse", "brand", "pad")
    )
    is_key = [True] * len(title) + [False] * len(red + mouse) + [True] * len(brand) + [False] * len(pad)
    assert (tokens & ~KEY_FLAG).tolist() == title + red + mouse + brand + pad
    assert (tokens & KEY_FLAG).astype(bool).tolist() == is_key


def test_a_tokenizer_that_adds_spaces_gets_none() -> None:
    tokenizer = build_tokenizer(TokenizeConfig(vocab_size=300, max_tokens=2), TEXTS)
    tokens, _ = KeyValueTokenizer(tokenizer, KeyValueConfig())([[("title", ["red shoe"])]])
    tokenizer.no_truncation()  # its own cut at 2 tokens is not ours
    expected = [tokenizer.encode(word, add_special_tokens=False).ids for word in ("title", "red shoe")]
    assert (tokens & ~KEY_FLAG).tolist() == expected[0] + expected[1]
    assert len(tokens) > 4


@pytest.mark.parametrize("limit", [1, 2, 3, 32])
def test_an_attribute_is_cut_with_its_key(limit: int) -> None:
    tokenizer = build_tokenizer(TokenizeConfig(vocab_size=300), TEXTS)
    whole, _ = KeyValueTokenizer(tokenizer, KeyValueConfig())([[("brand", ["acme red"])]])
    cut, _ = KeyValueTokenizer(tokenizer, KeyValueConfig(max_attribute_tokens=limit))([[("brand", ["acme red"])]])
    assert cut.tolist() == whole[:limit].tolist()


def test_only_the_first_attributes_are_read_and_no_item_is_empty() -> None:
    tokenizer = build_tokenizer(TokenizeConfig(vocab_size=300), TEXTS)
    encode = KeyValueTokenizer(tokenizer, KeyValueConfig(max_attributes=2))
    two, three = [("title", ["red"]), ("brand", ["acme"])], [("title", ["red"]), ("brand", ["acme"]), ("color", ["x"])]
    found = split(*encode([two, [], three, [("", ["red"])], [("", [])]]))
    assert found[0] == found[2]
    assert found[1] == found[4] == [encode.vocabulary.unknown_id]
    assert found[3] == [token for token in split(*encode([[("title", ["red"])]]))[0] if not token & KEY_FLAG]
    tokens, offsets = encode([])
    assert (len(tokens), offsets.tolist()) == (0, [0])
