"""Item text -> token ids. The tokenizer's name and digest travel in manifests and checkpoints."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from userrep.config import Config, ConfigError
from userrep.data.feature_vocabulary import FeatureConfig
from userrep.data.item_text import ATTRIBUTE_SEPARATOR, KEY_SEPARATOR, parse_attributes, plain_text
from userrep.data.key_values import KeyValueConfig, KeyValueTokenizer

TOKENIZER_NAME = "tokenizer.json"
IDF_NAME = "idf.parquet"
PAD_TOKEN = "<pad>"
TEXT_BATCH_ROWS = 4096


class TokenizeConfig(Config):
    """Which tokenizer, and how much of an item's text it sees."""

    name: str = "bpe"  # `bpe` trains one on the item texts; else a local path or hub name of a fast tokenizer
    vocab_size: int = Field(default=8192, ge=257)  # of which 256 are bytes and one pads; only for `bpe`
    min_frequency: int = Field(default=2, ge=1)  # only for `bpe`
    max_tokens: int = Field(default=32, ge=1)  # tokens kept per item, from the left; only of plain texts
    # How items are read as attributes with keys, which Recformer needs; None: as plain texts. The source must keep
    # them: `source.keep_attributes=true`.
    attributes: KeyValueConfig | None = None
    # Features of items, which the two-tower model reads, from their attributes; none: no features are made
    features: tuple[FeatureConfig, ...] = ()
    max_training_items: int = Field(default=1_000_000, ge=1)  # only for `bpe`: the first so many items


class TokenizerMismatchError(ValueError):
    """Token ids of one tokenizer met a model or table of another."""


def build_tokenizer(config: TokenizeConfig, texts: Iterable[str]) -> Tokenizer:
    """Trains a byte-level BPE on `texts`, or loads a Hugging Face fast tokenizer.

    Raises:
        ConfigError: the named tokenizer cannot be loaded, or is not a fast one.
    """
    if config.name == "bpe":
        tokenizer = _train_bpe(config, map(plain_text if config.attributes is None else _with_keys, texts))
    else:
        tokenizer = _load(config.name)
    tokenizer.no_padding()
    tokenizer.enable_truncation(config.max_tokens)
    return tokenizer


def tokenizer_digest(tokenizer: Tokenizer, attributes: KeyValueConfig | None = None) -> str:
    """sha256 of a tokenizer's full definition (vocabulary, merges, normalisation, truncation, how keys are read)."""
    form = "" if attributes is None else attributes.model_dump_json()
    return hashlib.sha256((tokenizer.to_str() + form).encode()).hexdigest()


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


def tokenize(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each text. A text without any known token gets the pad id, so that no item is empty."""
    plain = [plain_text(text) for text in texts]
    return [encoding.ids or [0] for encoding in tokenizer.encode_batch_fast(plain, add_special_tokens=False)]


ItemTokenizer = Callable[[list[str]], Sequence[Sequence[int] | np.ndarray]]  # texts in, token ids of each out


def open_item_tokenizer(path: Path, attributes: KeyValueConfig | None) -> ItemTokenizer:
    """What turns item texts into token ids.

    Args:
        path: of a tokenizer.json.
        attributes: as in `TokenizeConfig`; with them, tokens of keys are flagged (`data/key_values.py`).
    """
    tokenizer = Tokenizer.from_file(str(path))
    if attributes is None:
        return partial(tokenize, tokenizer)
    of_attributes = KeyValueTokenizer(tokenizer, attributes)

    def encode(texts: list[str]) -> list[np.ndarray]:
        tokens, offsets = of_attributes([parse_attributes(text) for text in texts])
        return np.split(tokens, offsets[1:-1]) if texts else []

    return encode


def write_idf(directory: Path, document_counts: np.ndarray, num_documents: int) -> None:
    """Writes the inverse document frequency of each token, log((1 + n) / (1 + df)) + 1.

    A document is an entry of a row group's item dictionary, so an item that many users share counts more often.

    Source: the smoothed form of scikit-learn's TfidfTransformer. Differs: none.
    """
    idf = np.log((1 + num_documents) / (1 + document_counts)) + 1
    pq.write_table(pa.table({"token_id": np.arange(len(idf)), "idf": idf.astype(np.float32)}), directory / IDF_NAME)


def read_idf(directory: Path) -> np.ndarray:
    """Inverse document frequency of each token of a tokenized table, float32 (V,)."""
    return pq.read_table(directory / IDF_NAME)["idf"].to_numpy().copy()


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


def _with_keys(text: str) -> str:
    return text.replace(KEY_SEPARATOR, " ").replace(ATTRIBUTE_SEPARATOR, " ")


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
        try:
            return Tokenizer.from_file(name)
        except Exception as error:  # tokenizers raises nothing more specific
            raise ConfigError(f"tokenize.name={name!r} is no tokenizer.json that can be read: {error}") from error
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
