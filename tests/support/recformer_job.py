"""A job whose items are tokenized attributes, and the table of a Recformer that reads them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from pipelines import ingest, tokenize
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Job
from tests.support.memory_source import run_serially
from tests.support.pretrained import shake
from userrep.data import ingest as library
from userrep.data.ingest import IngestConfig
from userrep.data.key_values import KeyValueConfig
from userrep.data.sources.parquet import ParquetSource
from userrep.data.tokenizer import TOKENIZER_NAME, TokenizeConfig
from userrep.data.vocabulary import Vocabulary
from userrep.manifest import Manifest, describe_file, write_manifest
from userrep.models.recformer import Recformer, RecformerConfig
from userrep.training.checkpoint import MODEL_FILE

MODEL = RecformerConfig(dim=16, num_layers=1, num_heads=2, mlp_dim=16, window=4, max_items=4, max_tokens=40)
ATTRIBUTES = KeyValueConfig(max_attribute_tokens=8)
NUM_ITEMS, NUM_USERS = 12, 30
BRANDS = ("acme", "zeta")


@contextmanager
def without_ray() -> Iterator[None]:
    """Tasks of ingest run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "run_tasks", run_serially)
        yield


def write_raw(directory: Path) -> None:
    """Users who walk around a circle of items."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(0)
    events = []
    for user in range(NUM_USERS):
        start, length = rng.integers(NUM_ITEMS), rng.integers(2, 7)
        places = range(start, start + length)
        events += [{"user_id": f"u{user}", "item_id": f"i{n % NUM_ITEMS}", "timestamp": n} for n in places]
    items = [{"item_id": f"i{n}", "title": f"thing {n}", "brand": BRANDS[n % 2]} for n in range(NUM_ITEMS)]
    pq.write_table(pa.Table.from_pylist(events), directory / "events.parquet")
    pq.write_table(pa.Table.from_pylist(items), directory / "items.parquet")


def make_job(directory: Path, tokenizer: str = "bpe", has_keys: bool = True, max_tokens: int = 32) -> Job:
    """A job on the raw data beside its working directory, ingested and tokenized."""
    raw = directory.parent / "raw"
    if not raw.exists():
        write_raw(raw)
    config = JobConfig(
        source=ParquetSource(path=raw, text_columns=("title", "brand"), keep_attributes=has_keys),
        ingest=IngestConfig(num_shards=2),
        tokenize=TokenizeConfig(
            name=tokenizer, vocab_size=270, max_tokens=max_tokens, attributes=ATTRIBUTES if has_keys else None
        ),
    )
    job = Job(config, directory, Console())
    directory.mkdir()
    with without_ray():
        ingest.run(job)
        tokenize.run(job)
    return job


def write_recformer(directory: Path, job: Job) -> Recformer:
    """A committed table of a random Recformer for the tokens of a job, as `userrep pretrain` writes one."""
    directory.mkdir(parents=True)
    shutil.copyfile(job.path(tokenize.TABLE) / TOKENIZER_NAME, directory / TOKENIZER_NAME)
    torch.manual_seed(0)
    model = Recformer(MODEL, Vocabulary.of(Tokenizer.from_file(str(directory / TOKENIZER_NAME))).size)
    shake(model)
    save_file(model.state_dict(), directory / MODEL_FILE)
    files = tuple(describe_file(directory, directory / name) for name in (MODEL_FILE, TOKENIZER_NAME))
    facts = {name: job.manifest(tokenize.TABLE).facts[name] for name in ("vocab_size", "tokenizer_digest")}
    facts |= {
        "num_embeddings": len(model.token_embedding.weight),
        "model": MODEL.model_dump(mode="json"),
        "attributes": ATTRIBUTES.model_dump(mode="json"),
    }
    write_manifest(
        directory, Manifest(table="encoder", stage="pretrain", config={"system": "recformer"}, files=files, facts=facts)
    )
    return model.eval()
