import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.support.shared_data import ROOT
from userrep.config import ConfigError
from userrep.data.tokenizer import (
    TokenizeConfig,
    TokenizerMismatchError,
    build_tokenizer,
    check_digest,
    read_texts,
    tokenize,
    tokenizer_digest,
)

TEXTS = [
    "red summer dress",
    "무선 청소기 다이슨",
    "무선 이어폰",
    "dress red \U0001f457\U0001f1f0\U0001f1f7",
    "tea 茶 чай",
] * 3
CONFIG = TokenizeConfig(vocab_size=300, max_tokens=200)
RECFORMER = ROOT.parent / "shared" / "parity" / "recformer" / "tok"


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return build_tokenizer(CONFIG, TEXTS)


@pytest.mark.parametrize("text", [*TEXTS[:5], "never seen: 한국어 ไทย \U0001f9d1\u200d\U0001f680 \0 e\u0301", "a"])
def test_byte_level_bpe_loses_nothing(bpe: Tokenizer, text: str):
    (ids,) = tokenize(bpe, [text])
    assert bpe.decode(ids) == " " + text


# Tabs and newlines set the attributes of an item apart, and are in no plain text.
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n"), min_size=1, max_size=20),
        max_size=5,
    )
)
def test_any_text_comes_back(texts: list[str]):
    bpe = build_tokenizer(CONFIG, TEXTS)
    for text, ids in zip(texts, tokenize(bpe, texts), strict=True):
        assert ids
        assert bpe.decode(ids).removeprefix(" ") == text.removeprefix(" ")


def test_a_word_has_one_token_sequence_wherever_it_stands(bpe: Tokenizer):
    alone, first, last = tokenize(bpe, ["red", "red dress", "dress red"])
    assert first[: len(alone)] == alone == last[-len(alone) :]


def test_no_item_is_left_without_a_token(bpe: Tokenizer):
    assert next(len(ids) for ids in tokenize(bpe, ["", "red"])) == 1
    assert tokenize(bpe, []) == []


@pytest.mark.parametrize("max_tokens", [1, 3])
def test_truncation_keeps_the_left_end(bpe: Tokenizer, max_tokens: int):
    cut = build_tokenizer(TokenizeConfig(vocab_size=300, max_tokens=max_tokens), TEXTS)
    for text in TEXTS[:5]:
        (whole,), (kept,) = tokenize(bpe, [text]), tokenize(cut, [text])
        assert kept == whole[:max_tokens]
    assert tokenizer_digest(cut) != tokenizer_digest(bpe)


def test_digest_is_stable_over_save_load_and_training_again(bpe: Tokenizer, tmp_path: Path):
    bpe.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer_digest(loaded) == tokenizer_digest(bpe)
    assert tokenize(loaded, TEXTS) == tokenize(bpe, TEXTS)
    named = build_tokenizer(TokenizeConfig(name=str(tmp_path / "tokenizer.json"), max_tokens=200), [])
    assert tokenizer_digest(named) == tokenizer_digest(bpe)


def test_training_gives_the_same_tokenizer_in_another_process(tmp_path: Path):
    # Many words of equal frequency, so that merges tie; other hash seeds and threads.
    texts = [f"{a}{b}{c} {c}{a}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = (
        "import json, sys; from userrep.data.tokenizer import *\n"
        "texts = json.load(open(sys.argv[1]))\n"
        "print(tokenizer_digest(build_tokenizer(TokenizeConfig(vocab_size=600), texts)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "texts.json")]
    digests = {tokenizer_digest(build_tokenizer(TokenizeConfig(vocab_size=600), texts))}
    for number in (1, 2):
        environment = {**os.environ, "PYTHONHASHSEED": str(number), "TOKENIZERS_PARALLELISM": "true"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        digests.add(run.stdout.strip())
    assert len(digests) == 1


@pytest.mark.parametrize("texts", [[*TEXTS, "other words altogether", "other words altogether"], TEXTS[:3]])
def test_digest_changes_with_the_vocabulary(bpe: Tokenizer, texts: list[str]):
    other = build_tokenizer(CONFIG, texts)
    assert other.get_vocab() != bpe.get_vocab()
    assert tokenizer_digest(other) != tokenizer_digest(bpe)


def test_mixing_tokenizers_is_refused():
    check_digest("a" * 64, "a" * 64, "work/shards")
    with pytest.raises(TokenizerMismatchError, match=r"work/shards was made with tokenizer b{12}, but a{12} is needed"):
        check_digest("a" * 64, "b" * 64, "work/shards")


def test_a_local_hugging_face_tokenizer_gives_its_own_ids(tmp_path: Path):
    if not RECFORMER.is_dir():
        pytest.skip("the tiny RoBERTa tokenizer is not at ../shared/parity/recformer/tok beside the repository")
    from transformers import RobertaTokenizer

    own = RobertaTokenizer.from_pretrained(str(RECFORMER))
    own.save_pretrained(str(tmp_path))
    texts = ["Logitech mouse", "red dress", "무선 청소기"]
    loaded = build_tokenizer(TokenizeConfig(name=str(tmp_path), max_tokens=6), [])
    assert tokenize(loaded, texts) == [own(text, add_special_tokens=False)["input_ids"][:6] for text in texts]
    assert len(tokenize(loaded, ["a " * 50])[0]) == 6


def test_a_hugging_face_folder_written_here_is_loaded(bpe: Tokenizer, tmp_path: Path):
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>").save_pretrained(str(tmp_path))
    loaded = build_tokenizer(TokenizeConfig(name=str(tmp_path), max_tokens=200), [])
    assert tokenize(loaded, TEXTS) == tokenize(bpe, TEXTS)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match="tokenizer"):
        build_tokenizer(TokenizeConfig(name=str(path)), [])


@pytest.mark.parametrize("limit", [0, 1, 6, 7, 100])
def test_the_first_texts_are_read_across_files(tmp_path: Path, limit: int):
    texts = [f"text {number}" for number in range(12)]
    for part in range(4):  # the second is empty
        lines = [texts[:5], [], texts[5:6], texts[6:]][part]
        pq.write_table(
            pa.table({"item_id": lines, "text": pa.array(lines, pa.string())}), tmp_path / f"part-{part}.parquet"
        )
    assert list(read_texts(sorted(tmp_path.iterdir()), limit)) == texts[:limit]


@pytest.mark.parametrize(
    "values", [{"vocab_size": 256}, {"min_frequency": 0}, {"max_tokens": 0}, {"max_training_items": 0}]
)
def test_configs_that_make_no_sense_are_refused(values: dict[str, int]):
    with pytest.raises(ConfigError, match=next(iter(values))):
        TokenizeConfig.parse(values)
