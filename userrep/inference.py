"""Checkpoint -> user vectors, and those of items, part by part, with Ray Data actors that load the encoder once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import ray
import torch
import torch.nn.functional as F
from ray.data import ActorPoolStrategy

from userrep import storage
from userrep.continual.catalog import build_method
from userrep.continual.network import TaskSpec
from userrep.data.assemble import NO_TIME, users_file
from userrep.data.parse import ITEMS
from userrep.data.task_builder import left_padded, places_from_end
from userrep.data.tokenizer import check_digest
from userrep.data.views import RowGroup, all_histories, read_row_group
from userrep.manifest import FileEntry, read_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.models.clue_backbone import ClueBackbone
from userrep.publishing.entity import ITEM
from userrep.publishing.table import bucket_of, write_part
from userrep.publishing.vectors import rows_dtype
from userrep.schema import item_embeddings, task_column, user_embeddings
from userrep.training.cells import METHOD_FILE
from userrep.training.checkpoint import load_model
from userrep.training.encoders import ItemEncoder, TrainedEncoder, open_encoder
from userrep.training.encoding import encode_items


@torch.no_grad()
def encode_users(encoder: TrainedEncoder, group: RowGroup, max_events: int) -> np.ndarray:
    """One vector per user, float32 (N, D), L2 norm 1: the mean of the vectors of the user's histories, normalised."""
    history_HD = encoder.encode_histories(all_histories(group, max_events))
    user_H = torch.from_numpy(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)))
    user_ND = torch.zeros(len(group.keys), history_HD.shape[1]).index_add_(0, user_H, history_HD)
    return F.normalize(user_ND, dim=-1).numpy()


ENCODE_ITEMS = 1024  # items whose texts are tokenized at once


class TaskVectors:
    """User vectors as the tasks of a taught encoder see them.

    Attributes:
        tasks: names of the tasks that have vectors of their own, all but the universal one.
    """

    def __init__(self, directory: Path) -> None:
        """Args: directory is a committed table of the stage `teach`."""
        manifest = read_manifest(directory)
        specs = [TaskSpec(task["name"], task["kind"], task["num_classes"]) for task in manifest.facts["tasks"]]
        config, choice = ClueConfig.parse(manifest.config["model"]), manifest.config["teach"]["method"]
        self._backbones: list[ClueBackbone] = []
        self._method = build_method(choice["name"], choice["options"], lambda: self._new_backbone(config))
        self._method.make_room(specs)
        load_model(directory / METHOD_FILE, self._method)
        self._method.eval()
        self._max_items = manifest.config["teach"]["max_items"]
        self.tasks = tuple(spec.name for spec in specs[1:])

    @torch.no_grad()
    def encode(self, model: Clue, group: RowGroup) -> dict[str, np.ndarray]:
        """By task one vector per user, float32 (N, D), L2 norm 1."""
        item_UD = encode_items(model, group.tokens, group.token_offsets)
        for backbone in self._backbones:
            backbone.item_VD = torch.cat([torch.zeros_like(item_UD[:1]), item_UD])
        items_NL = torch.from_numpy(recent_items(group, self._max_items)).long()
        return {
            name: F.normalize(self._method.vectors(items_NL, number), dim=-1).numpy()
            for number, name in enumerate(self.tasks, 1)
        }

    def _new_backbone(self, config: ClueConfig) -> ClueBackbone:
        """One whose item table is that of the row group at hand."""
        self._backbones.append(ClueBackbone(config, torch.zeros(1, config.dim)))
        return self._backbones[-1]


def recent_items(group: RowGroup, max_items: int) -> np.ndarray:
    """The most recent items of every user in all services, left-padded: 1 + reference, int32 (N, max_items).

    As in `data/shard_tasks.py`, but nothing is asked, so nothing is left out: oldest first, events of unknown time
    before all others, then by service.
    """
    counts_H = np.diff(group.history_offsets)
    users_E = np.repeat(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)), counts_H)
    times_E = group.times.fill_null(NO_TIME).to_numpy()
    order = np.lexsort([np.arange(len(users_E)), np.repeat(group.services, counts_H), times_E, users_E])
    order = order[places_from_end(users_E[order]) < max_items]
    return left_padded(users_E[order], group.items[order] + 1, len(group.keys), max_items)


def embedding_rows(group: RowGroup, vectors: np.ndarray, dtype: str, task_vectors: dict[str, np.ndarray]) -> pa.Table:
    """Rows of `schema.user_embeddings` for the users of a row group.

    Args:
        group: the users.
        vectors: of each user, (N, D).
        dtype: of the table.
        task_vectors: by task, (N, D) each.
    """
    event_starts = group.history_offsets[group.user_offsets]
    columns = {
        "user_id": group.user_ids,
        "embedding": _vector_column(vectors, dtype),
        "num_events": pa.array(np.diff(event_starts).astype(np.int32)),
        "last_time": _last_times(group),
        **{task_column(name): _vector_column(values, dtype) for name, values in task_vectors.items()},
    }
    schema = user_embeddings(vectors.shape[1], dtype, tuple(task_vectors))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _vector_column(vectors: np.ndarray, dtype: str) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.dtype(dtype)).ravel()), vectors.shape[1])


class ShardEncoder:
    """Ray Data actor: a shard number in, the entry of the table part that it wrote out."""

    def __init__(self, encoder: str, shards: str, target: str, max_events: int, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder = open_encoder(storage.fetch(Path(encoder)))
        self._task_vectors = TaskVectors(Path(encoder)) if is_taught(Path(encoder)) else None
        self._shards, self._target = storage.fetch(Path(shards)), Path(target)
        self._target.mkdir(parents=True, exist_ok=True)
        self._max_events, self._dtype, self._rows_dtype = max_events, dtype, rows_dtype(dtype)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes all users of a shard; memory is bounded by the shard's vectors plus one row group."""
        shard = int(row["id"])
        tasks = self._task_vectors.tasks if self._task_vectors else ()
        parts = [user_embeddings(self._encoder.dim, self._rows_dtype, tasks).empty_table()]
        for number in range(pq.ParquetFile(self._shards / users_file(shard)).num_row_groups):
            group = read_row_group(self._shards, shard, number)
            vectors, task_vectors = encode_users(self._encoder, group, self._max_events), {}
            if self._task_vectors:
                assert isinstance(self._encoder.model, Clue), "no other encoder is taught tasks"
                task_vectors = self._task_vectors.encode(self._encoder.model, group)
            parts.append(embedding_rows(group, vectors, self._rows_dtype, task_vectors))
        entry = write_part(self._target, shard, pa.concat_tables(parts), dtype=self._dtype)
        storage.send(self._target, entry.path)
        return {"shard": shard, "entry": json.dumps(entry.model_dump(mode="json"))}


def is_taught(encoder: Path) -> bool:
    """Whether a committed table of an encoder holds tasks."""
    return "tasks" in read_manifest(encoder).facts


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
    arguments = {
        "encoder": str(encoder),
        "shards": str(shards),
        "target": str(target),
        "max_events": max_events,
        "dtype": dtype,
    }
    return _run_actors(ShardEncoder, arguments, num_shards, progress)


class CatalogueEncoder:
    """Ray Data actor: the number of a bucket of items in, the entry of the table part that it wrote out."""

    def __init__(self, encoder: str, ingest: str, target: str, num_parts: int, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        trained = open_encoder(storage.fetch(Path(encoder)))
        assert isinstance(trained, ItemEncoder), "the stage asks for items of such encoders alone"
        self._encoder, self._ingest, self._target = trained, storage.fetch(Path(ingest)), Path(target)
        self._target.mkdir(parents=True, exist_ok=True)
        self._num_parts, self._dtype = num_parts, dtype

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes the items of a bucket; the catalogue is scanned, and memory bounded by the bucket's vectors."""
        bucket, found = int(row["id"]), dict[str, str]()
        files = [str(path) for path in sorted((self._ingest / ITEMS).glob("part-*.parquet"))]
        for batch in pa.dataset.dataset(files, format="parquet").to_batches(columns=["item_id", "text"]):
            for item_id, text in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                if bucket_of(item_id, self._num_parts) == bucket:
                    found.setdefault(item_id, text)  # of several records of an item the first one counts
        schema = item_embeddings(self._encoder.dim, rows_dtype(self._dtype))
        parts, ids = [schema.empty_table()], list(found)
        for start in range(0, len(ids), ENCODE_ITEMS):
            part = ids[start : start + ENCODE_ITEMS]
            vectors = self._encoder.encode_items(part, [found[item_id] for item_id in part])
            column = _vector_column(vectors, rows_dtype(self._dtype))
            parts.append(pa.table([pa.array(part, pa.string()), column], schema=schema))
        entry = write_part(self._target, bucket, pa.concat_tables(parts), ITEM, self._dtype)
        storage.send(self._target, entry.path)
        return {"shard": bucket, "entry": json.dumps(entry.model_dump(mode="json"))}


def embed_items(
    encoder: Path, ingest: Path, target: Path, num_parts: int, dtype: str, progress: Callable[[int, int, int], None]
) -> list[FileEntry]:
    """Writes the vectors of all items of an ingested table. Returns the entries of the parts, by bucket.

    Args:
        encoder: directory of an encoder that has vectors of items.
        ingest: directory of the table.
        target: where the parts go.
        num_parts: of the table; items are dealt to them by the hash of their id.
        dtype: of the vectors.
        progress: called in the driver as parts are done.
    """
    arguments = {"encoder": str(encoder), "ingest": str(ingest), "target": str(target), "dtype": dtype}
    return _run_actors(CatalogueEncoder, {**arguments, "num_parts": num_parts}, num_parts, progress)


def _run_actors(
    actor: type, arguments: dict[str, Any], num_parts: int, progress: Callable[[int, int, int], None]
) -> list[FileEntry]:
    """Entries of the parts 0 to num_parts - 1, each written by one of several actors; all are here at the end."""
    cpus = int(ray.cluster_resources().get("CPU", 1))
    actors = min(max(1, cpus - 1), num_parts)  # one CPU stays free for the tasks that feed the actors
    dataset = ray.data.range(num_parts, override_num_blocks=num_parts).map(
        cast(Any, actor),  # a class is an actor; Ray's annotation knows functions only
        fn_constructor_kwargs={**arguments, "threads": max(1, cpus // actors)},
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    entries: dict[int, FileEntry] = {}
    for row in dataset.iter_rows():
        entries[int(row["shard"])] = FileEntry.parse(json.loads(row["entry"]))
        progress(len(entries), num_parts, sum(entry.rows or 0 for entry in entries.values()))
    storage.receive(Path(arguments["target"]), "part-*")
    return [entries[part] for part in range(num_parts)]


def _last_times(group: RowGroup) -> pa.Array:
    """Latest known time of each user's events, null where none is known."""
    unknown = np.iinfo(np.int64).min
    times = group.times.fill_null(unknown).to_numpy()
    latest = np.maximum.reduceat(times, group.history_offsets[group.user_offsets[:-1]])
    return pa.array(latest, mask=latest == unknown)
