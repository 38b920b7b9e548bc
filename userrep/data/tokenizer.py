"""Item text -> token ids. The tokenizer's name and digest travel in manifests and checkpoints."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from userrep.config import Config, ConfigError

TOKENIZER_NAME = "tokenizer.json"
PAD_TOKEN = "<pad>"
TEXT_BATCH_ROWS = 4096


class TokenizeConfig(Config):
    """Which tokenizer, and how much of an item's text it sees."""

    name: str = "bpe"  # `bpe` trains one on the item texts; else a local path or hub name of a fast tokenizer
    vocab_size: int = 8192  # only for `bpe`
    min_frequency: int = 2  # only for `bpe`
    max_tokens: int = 32  # tokens kept per item, from the left
    max_training_items: int = 1_000_000  # only for `bpe`: the first so many items


class TokenizerMismatchError(ValueError):
    """Token ids of one tokenizer met a model or table of another."""


def build_tokenizer(config: TokenizeConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE on `texts`, or loads a Hugging Face fast tokenizer.

    Raises:
        ConfigError: the named tokenizer cannot be loaded, or is not a fast one.
    """
    tokenizer = _train_bpe(config, texts) if config.name == "bpe" else _load(config.name)
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_tokens)
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """sha256 of the tokenizer's full definition (vocabulary, merges, normalisation, truncation)."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def check_digest(expected: str, received: str, where: str) -> None:
    """Refuses to mix token ids of two tokenizers.

    Raises:
        TokenizerMismatchError: names both digests and what to do.
    """
    if expected != received:
        raise TokenizerMismatchError(
            f"{where} was made with tokenizer {received[:12]}, but {expected[:12]} is needed: "
            "tokenize the data with the model's own tokenizer.json (--set tokenize.name=PATH), or train again"
        )


def tokenize(tokenizer: Tokenizer, texts: pa.ChunkedArray | pa.Array) -> pa.ListArray:
    """Token ids of each text, list<int32> (N,). A text without any known token gets the pad id, so no item is empty."""
    encodings = tokenizer.encode_batch_fast(texts.to_pylist(), add_special_tokens=False)
    ids = [encoding.ids or [0] for encoding in encodings]
    return pa.array(ids, type=pa.list_(pa.int32()))


def read_texts(item_files: list[Path], limit: int) -> Iterator[str]:
    """Streams the first `limit` item texts of an items table."""
    remaining = limit
    for batch in pa.dataset.dataset([str(path) for path in item_files], format="parquet").to_batches(
        columns=["text"], batch_size=TEXT_BATCH_ROWS
    ):
        yield from batch.column("text").to_pylist()[:remaining]
        remaining -= batch.num_rows
        if remaining <= 0:
            return


def _train_bpe(config: TokenizeConfig, texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    # add_prefix_space: a word has one token sequence, wherever in the text it stands.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        min_frequency=config.min_frequency,
        special_tokens=[PAD_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _load(name: str) -> Tokenizer:
    if name.endswith(".json") and Path(name).is_file():
        return Tokenizer.from_file(name)
    from transformers import AutoTokenizer  # imported here: it takes seconds, and only this branch needs it

    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"tokenize.name={name!r} is neither `bpe`, nor a tokenizer.json, nor a loadable tokenizer: {error}"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"tokenize.name={name!r} is not a fast tokenizer (it has no tokenizers backend)")
    return Tokenizer.from_str(backend.to_str())
