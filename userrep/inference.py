"""Checkpoint -> user vectors, shard by shard, with Ray Data actors that load the encoder once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from ray.data import ActorPoolStrategy

from userrep.data.assemble import users_file
from userrep.data.tokenizer import check_digest
from userrep.data.views import RowGroup, all_histories, read_row_group
from userrep.manifest import FileEntry, read_manifest
from userrep.models.clue import Clue
from userrep.publishing.table import write_part
from userrep.schema import user_embeddings
from userrep.training.checkpoint import load_encoder
from userrep.training.encoding import encode


@torch.no_grad()
def encode_users(model: Clue, group: RowGroup, max_events: int) -> np.ndarray:
    """One vector per user, float32 (N, D), L2 norm 1: the mean of the vectors of the user's histories, normalised."""
    history_HD = encode(model, all_histories(group, max_events))
    user_H = torch.from_numpy(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)))
    user_ND = torch.zeros(len(group.keys), history_HD.shape[1]).index_add_(0, user_H, history_HD)
    return F.normalize(user_ND, dim=-1).numpy()


def embedding_rows(group: RowGroup, vectors: np.ndarray, dtype: str) -> pa.Table:
    """Rows of `schema.user_embeddings` for the users of a row group."""
    schema = user_embeddings(vectors.shape[1], dtype)
    flat = pa.array(vectors.astype(np.dtype(dtype)).ravel())
    event_starts = group.history_offsets[group.user_offsets]
    return pa.table(
        [
            group.user_ids,
            pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            pa.array(np.diff(event_starts).astype(np.int32)),
            _last_times(group),
        ],
        schema=schema,
    )


class ShardEncoder:
    """Ray Data actor: a shard number in, the entry of the table part that it wrote out."""

    def __init__(self, encoder: str, shards: str, target: str, max_events: int, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = load_encoder(Path(encoder))
        self._shards, self._target = Path(shards), Path(target)
        self._max_events, self._dtype = max_events, dtype

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes all users of a shard; memory is bounded by the shard's vectors plus one row group."""
        shard = int(row["id"])
        parts = [user_embeddings(self._model.config.dim, self._dtype).empty_table()]
        for number in range(pq.ParquetFile(self._shards / users_file(shard)).num_row_groups):
            group = read_row_group(self._shards, shard, number)
            parts.append(embedding_rows(group, encode_users(self._model, group, self._max_events), self._dtype))
        entry = write_part(self._target, shard, pa.concat_tables(parts))
        return {"shard": shard, "entry": json.dumps(entry.model_dump(mode="json"))}


def embed_shards(
    encoder: Path, shards: Path, target: Path, max_events: int, dtype: str, progress: Callable[[int, int, int], None]
) -> list[FileEntry]:
    """Writes one table part per shard. Returns their entries, in shard order.

    Raises:
        TokenizerMismatchError: the shards were made with another tokenizer than the encoder.
    """
    shards_manifest = read_manifest(shards)
    check_digest(
        read_manifest(encoder).facts["tokenizer_digest"], shards_manifest.facts["tokenizer_digest"], str(shards)
    )
    num_shards = len(shards_manifest.facts["shards"])
    cpus = int(ray.cluster_resources().get("CPU", 1))
    actors = min(max(1, cpus - 1), num_shards)  # one CPU stays free for the tasks that feed the actors
    arguments = {
        "encoder": str(encoder),
        "shards": str(shards),
        "target": str(target),
        "max_events": max_events,
        "dtype": dtype,
        "threads": max(1, cpus // actors),
    }
    dataset = ray.data.range(num_shards, override_num_blocks=num_shards).map(
        cast(Any, ShardEncoder),  # a class is an actor; Ray's annotation knows functions only
        fn_constructor_kwargs=arguments,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    entries: dict[int, FileEntry] = {}
    for row in dataset.iter_rows():
        entries[int(row["shard"])] = FileEntry.parse(json.loads(row["entry"]))
        progress(len(entries), num_shards, sum(entry.rows or 0 for entry in entries.values()))
    return [entries[shard] for shard in range(num_shards)]


def _last_times(group: RowGroup) -> pa.Array:
    """Latest known time of each user's events, null where none is known."""
    unknown = np.iinfo(np.int64).min
    times = group.times.fill_null(unknown).to_numpy()
    latest = np.maximum.reduceat(times, group.history_offsets[group.user_offsets[:-1]])
    return pa.array(latest, mask=latest == unknown)
