"""Checkpoint -> user vectors, and those of items, part by part, with Ray Data actors that load the encoder once."""

import json
from collections.abc import Callable, Sequence
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
from userrep.data.assemble import users_file
from userrep.data.input_digests import input_digests
from userrep.data.parse import ITEMS
from userrep.data.tokenizer import check_digest
from userrep.data.views import RowGroup, all_histories, read_row_group
from userrep.manifest import FileEntry, read_manifest
from userrep.models.clue import Clue
from userrep.models.row_stable import RowStable
from userrep.publishing.entity import ITEM
from userrep.publishing.inputs import INPUTS, write_inputs
from userrep.publishing.table import bucket_of, write_part
from userrep.publishing.vectors import rows_dtype
from userrep.publishing.verify import PART_NAME
from userrep.schema import item_embeddings, task_column, user_embeddings
from userrep.task_vectors import TaskVectors, recent_items
from userrep.training.encoders import ItemEncoder, TrainedEncoder, open_encoder


@torch.no_grad()
def encode_users(encoder: TrainedEncoder, group: RowGroup, max_events: int) -> np.ndarray:
    """One vector per user, float32 (N, D), L2 norm 1: the mean of the vectors of the user's histories, normalised.

    Where the encoder `is_row_stable`, a user has the same vector, bit for bit, in any company.
    """
    user_H = torch.from_numpy(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)))
    with RowStable():
        history_HD = encoder.encode_histories(all_histories(group, max_events))
        user_ND = torch.zeros(len(group.keys), history_HD.shape[1]).index_add_(0, user_H, history_HD)
        return F.normalize(user_ND, dim=-1).numpy()


ENCODE_ITEMS = 1024  # items whose texts are tokenized at once


def embedding_rows(group: RowGroup, vectors: np.ndarray, dtype: str, task_vectors: dict[str, np.ndarray]) -> pa.Table:
    """Rows of `schema.user_embeddings` for the users of a row group.

    Args:
        group: the users.
        vectors: of each user, (N, D).
        dtype: of the table.
        task_vectors: by task, (N, D) each.
    """
    facts = event_facts(group)
    columns = {
        **{name: facts[name] for name in facts.schema.names},
        "embedding": _vector_column(vectors, dtype),
        **{task_column(name): _vector_column(values, dtype) for name, values in task_vectors.items()},
    }
    schema = user_embeddings(vectors.shape[1], dtype, tuple(task_vectors))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def event_facts(group: RowGroup | None) -> pa.Table:
    """The columns of a table of users that no encoder makes: `user_id`, `num_events`, `last_time`; None has no rows."""
    schema = pa.schema([user_embeddings(1, "float32").field(name) for name in ("user_id", "num_events", "last_time")])
    if group is None:
        return schema.empty_table()
    num_events = np.diff(group.history_offsets[group.user_offsets]).astype(np.int32)
    return pa.table([group.user_ids, pa.array(num_events), _last_times(group)], schema=schema)


def _vector_column(vectors: np.ndarray, dtype: str) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.dtype(dtype)).ravel()), vectors.shape[1])


class UserEncoder:
    """All that makes rows of a table of users from row groups: the encoder, and the tasks that it was taught."""

    def __init__(self, encoder: Path, max_events: int, dtype: str) -> None:
        """Args: encoder is the directory of its table; max_events of each history; dtype of the table."""
        encoder = storage.fetch(encoder)
        self._encoder = open_encoder(encoder)
        self._tasks = TaskVectors(encoder) if is_taught(encoder) else None
        self._max_events, self.dtype = max_events, dtype
        tasks = self._tasks.tasks if self._tasks else ()
        self.schema = user_embeddings(self._encoder.dim, rows_dtype(dtype), tasks)

    def rows(self, group: RowGroup) -> pa.Table:
        """Rows of `schema` for the users of a row group."""
        vectors, task_vectors = encode_users(self._encoder, group, self._max_events), {}
        if self._tasks:
            assert isinstance(self._encoder.model, Clue), "no other encoder is taught tasks"
            task_vectors = self._tasks.encode(self._encoder.model, group)
        return embedding_rows(group, vectors, rows_dtype(self.dtype), task_vectors)

    def inputs(self, group: RowGroup) -> pa.Table:
        """A digest of what was read of every user, with the columns of `inputs.INPUTS`."""
        recent_NL = recent_items(group, self._tasks.max_items) if self._tasks else None
        digests = input_digests(group, self._max_events, by_id=self._encoder.reads_ids, recent_NL=recent_NL)
        return pa.table({"user_id": group.user_ids, "digest": pa.array(digests)})


class ShardEncoder:
    """Ray Data actor: a shard number in, the entries of the files that it wrote out."""

    def __init__(self, encoder: str, shards: str, target: str, max_events: int, dtype: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._encoder = UserEncoder(Path(encoder), max_events, dtype)
        self._shards, self._target, self._dtype = storage.fetch(Path(shards)), Path(target), dtype
        self._target.mkdir(parents=True, exist_ok=True)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes all users of a shard; memory is bounded by the shard's vectors plus one row group."""
        shard = int(row["id"])
        parts, inputs = [self._encoder.schema.empty_table()], [INPUTS.empty_table()]
        for number in range(pq.ParquetFile(self._shards / users_file(shard)).num_row_groups):
            group = read_row_group(self._shards, shard, number)
            parts.append(self._encoder.rows(group))
            inputs.append(self._encoder.inputs(group).cast(INPUTS))
        entry = write_part(self._target, shard, pa.concat_tables(parts), dtype=self._dtype)
        entries = [entry, write_inputs(self._target, shard, pa.concat_tables(inputs))]
        storage.send(self._target, *(one.path for one in entries))
        return written(entries)


def written(entries: Sequence[FileEntry], **values: Any) -> dict[str, Any]:
    """What an actor says of the files that it wrote, as a row of Ray Data."""
    rows = sum(entry.rows or 0 for entry in entries if PART_NAME.fullmatch(entry.path))
    return {"rows": rows, "entries": json.dumps([entry.model_dump(mode="json") for entry in entries]), **values}


def is_taught(encoder: Path) -> bool:
    """Whether a committed table of an encoder holds tasks."""
    return "tasks" in read_manifest(encoder).facts


def embed_shards(
    encoder: Path, shards: Path, target: Path, max_events: int, dtype: str, progress: Callable[[int, int, int], None]
) -> list[FileEntry]:
    """Writes one table part per shard, and beside it what its users were encoded from. Returns entries of all files.

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
    return entries_of(run_actors(ShardEncoder, arguments, num_shards, progress))


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
        return written([entry])


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
    return entries_of(run_actors(CatalogueEncoder, {**arguments, "num_parts": num_parts}, num_parts, progress))


def run_actors(
    actor: type, arguments: dict[str, Any], num_tasks: int, progress: Callable[[int, int, int], None]
) -> list[dict[str, Any]]:
    """What several actors say of tasks 0 to num_tasks - 1, from `written`; all files are here then."""
    actors = num_actors(num_tasks)
    dataset = ray.data.range(num_tasks, override_num_blocks=num_tasks).map(
        cast(Any, actor),  # a class is an actor; Ray's annotation knows functions only
        fn_constructor_kwargs={**arguments, "threads": max(1, _num_cpus() // actors)},
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
    )
    done: list[dict[str, Any]] = []
    for row in dataset.iter_rows():
        done.append(row)
        progress(len(done), num_tasks, sum(int(one["rows"]) for one in done))
    storage.receive(Path(arguments["target"]), "part-*", "inputs-*")
    return done


def num_actors(num_tasks: int) -> int:
    """Actors that share so many tasks; one CPU stays free for the tasks that feed them."""
    return min(max(1, _num_cpus() - 1), num_tasks)


def entries_of(done: Sequence[dict[str, Any]]) -> list[FileEntry]:
    """Entries of all files that actors have written, by path."""
    entries = [FileEntry.parse(values) for row in done for values in json.loads(row["entries"])]
    return sorted(entries, key=lambda entry: entry.path)


def _num_cpus() -> int:
    return int(ray.cluster_resources().get("CPU", 1))


def _last_times(group: RowGroup) -> pa.Array:
    """Latest known time of each user's events, null where none is known."""
    unknown = np.iinfo(np.int64).min
    times = group.times.fill_null(unknown).to_numpy()
    latest = np.maximum.reduceat(times, group.history_offsets[group.user_offsets[:-1]])
    return pa.array(latest, mask=latest == unknown)
