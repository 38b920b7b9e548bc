"""Second pass of ingest: one bucket of events -> one shard of users with row-group item dictionaries.

A shard is a pair of Parquet files with the same number of row groups: `shard-00000.users.parquet` (histories as
references) and `shard-00000.items.parquet` (the items that the references of the same row group point to).
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq

from userrep import schema
from userrep.data.parse import ITEMS, QuarantineWriter, read_rejected_item_ids, read_spill
from userrep.data.split import SPLITS, SplitConfig, assign_splits, id_keys

NO_TIME = np.iinfo(np.int64).min
SCAN_BATCH_ROWS = 65_536
QUARANTINE_ROWS = 10_000


def users_file(shard: int) -> str:
    """File name of a shard's users."""
    return f"shard-{shard:05d}.users.parquet"


def items_file(shard: int) -> str:
    """File name of a shard's item dictionaries."""
    return f"shard-{shard:05d}.items.parquet"


def assemble_shard(
    bucket: int, services: list[str], directory: Path, row_group_size: int, split: SplitConfig
) -> dict[str, Any]:
    """Builds one shard from the spilled rows of its bucket.

    Args:
        bucket: shard number.
        services: service names; a history refers to them by index.
        directory: staging directory that `parse` has filled.
        row_group_size: users per row group.
        split: how users are held out.

    Returns:
        Facts for the manifest, JSON-plain: counts, and per row group the samples that each split and view offers.
    """
    events = read_spill(directory, "events", bucket)
    items = _read_items(directory, pc.unique(events["item_id"]))
    item_refs = pc.index_in(events["item_id"], value_set=items["item_id"]).combine_chunks()
    events, item_refs, unknown = _quarantine_unknown(events, item_refs, directory, bucket)

    keys = id_keys(events["user_id"])
    time_order = pc.fill_null(events["time"], NO_TIME).to_numpy()
    position = pc.fill_null(events["position"], 0).to_numpy()
    service = pc.index_in(events["service"], value_set=pa.array(services, pa.string())).to_numpy().astype(np.int8)
    # Rows of one user are found by (key, id): a key alone could collide.
    user_code = events["user_id"].combine_chunks().dictionary_encode().indices.to_numpy()

    # Without a time, the position tells two events apart.
    distinct_position = np.where(time_order == NO_TIME, position, 0)
    by_identity = np.lexsort((position, distinct_position, time_order, item_refs, service, user_code))
    identity = np.stack([user_code, service, item_refs, time_order, distinct_position])[:, by_identity]
    is_first = np.ones(len(by_identity), dtype=bool)
    is_first[1:] = (identity[:, 1:] != identity[:, :-1]).any(axis=0)
    kept = np.sort(by_identity[is_first])  # in source order: ties of time and position keep it

    order = kept[np.lexsort((position[kept], time_order[kept], service[kept], user_code[kept], keys[kept]))]
    histories = _Histories(
        user_ids=events["user_id"].take(pa.array(order)).combine_chunks(),
        keys=keys[order],
        services=service[order],
        item_refs=item_refs[order],
        times=events["time"].take(pa.array(order)).combine_chunks(),
        values=events["value"].take(pa.array(order)).combine_chunks(),
    )
    row_groups = _write(histories, items, _read_labels(directory, bucket), directory, bucket, row_group_size, split)
    return {
        "shard": bucket,
        "users": sum(group["rows"] for group in row_groups),
        "events": len(order),
        "duplicates": len(by_identity) - len(kept),
        **unknown,
        "row_groups": row_groups,
    }


class _Histories:
    """Flat event columns sorted by (user, service, time), with the borders of users and of their histories."""

    def __init__(
        self,
        user_ids: pa.Array,
        keys: np.ndarray,
        services: np.ndarray,
        item_refs: np.ndarray,
        times: pa.Array,
        values: pa.Array,
    ) -> None:
        self.services, self.item_refs, self.times, self.values = services, item_refs, times, values
        codes = user_ids.dictionary_encode().indices.to_numpy()
        new_user = np.ones(len(codes), dtype=bool)
        new_user[1:] = codes[1:] != codes[:-1]
        new_history = new_user.copy()
        new_history[1:] |= services[1:] != services[:-1]
        history_starts = np.flatnonzero(new_history)
        self.history_offsets = np.append(history_starts, len(codes)).astype(np.int32)  # in events
        self.user_offsets = np.append(
            np.searchsorted(history_starts, np.flatnonzero(new_user)), len(history_starts)
        ).astype(np.int32)  # in histories
        self.user_ids = user_ids.take(pa.array(np.flatnonzero(new_user)))
        self.user_keys = keys[new_user]

    def num_users(self) -> int:
        return len(self.user_ids)


def count_samples(
    user_offsets: np.ndarray, history_lengths: np.ndarray, splits: np.ndarray
) -> dict[str, dict[str, int]]:
    """Samples per split and kind of view.

    `service`: pairs of services that a user has. `time`: histories of at least two events, to be cut in two.
    `mixed`: users of at least two events in all. `next_item`: histories of at least two events.

    Args:
        user_offsets: borders of users in histories, (N + 1,).
        history_lengths: events of each history, (H,).
        splits: split of each user, (N,).
    """
    num_services = np.diff(user_offsets).astype(np.int64)
    pairs = num_services * (num_services - 1) // 2
    cuttable = np.add.reduceat((history_lengths >= 2).astype(np.int64), user_offsets[:-1]) if len(splits) else pairs
    totals = np.add.reduceat(history_lengths, user_offsets[:-1]) if len(splits) else pairs
    samples = {"service": pairs, "time": cuttable, "mixed": (totals >= 2).astype(np.int64), "next_item": cuttable}
    return {
        name: {kind: int(per_user[splits == index].sum()) for kind, per_user in samples.items()}
        for index, name in enumerate(SPLITS)
    }


def _write(
    histories: _Histories,
    items: pa.Table,
    labels: dict[str, list[tuple[str, str]]],
    directory: Path,
    bucket: int,
    row_group_size: int,
    split: SplitConfig,
) -> list[dict[str, Any]]:
    splits = assign_splits(histories.user_keys, split)
    facts = []
    with (
        pq.ParquetWriter(directory / users_file(bucket), schema.SHARD_USERS, compression="zstd") as users_writer,
        pq.ParquetWriter(directory / items_file(bucket), schema.SHARD_ITEMS_TEXT, compression="zstd") as items_writer,
    ):
        for start in range(0, histories.num_users(), row_group_size):
            end = min(start + row_group_size, histories.num_users())
            users, dictionary, user_offsets, lengths = _row_group(histories, splits, labels, start, end)
            users_writer.write_table(users, row_group_size=users.num_rows)
            texts = items.select(["item_id", "text"]).take(pa.array(dictionary)).cast(schema.SHARD_ITEMS_TEXT)
            items_writer.write_table(texts, row_group_size=max(1, texts.num_rows))
            facts.append(
                {
                    "rows": end - start,
                    "items": len(dictionary),
                    "samples": count_samples(user_offsets, lengths, splits[start:end]),
                }
            )
    return facts


def _row_group(
    histories: _Histories, splits: np.ndarray, labels: dict[str, list[tuple[str, str]]], start: int, end: int
) -> tuple[pa.Table, np.ndarray, np.ndarray, np.ndarray]:
    user_offsets = histories.user_offsets[start : end + 1]
    history_offsets = histories.history_offsets[user_offsets[0] : user_offsets[-1] + 1]
    first, last = int(history_offsets[0]), int(history_offsets[-1])
    dictionary, refs = np.unique(histories.item_refs[first:last], return_inverse=True)
    event_offsets = pa.array(history_offsets - first)
    values = [
        pa.array(histories.services[history_offsets[:-1]]),
        pa.ListArray.from_arrays(event_offsets, pa.array(refs.astype(np.int32))),
        pa.ListArray.from_arrays(event_offsets, histories.times.slice(first, last - first)),
        pa.ListArray.from_arrays(event_offsets, histories.values.slice(first, last - first)),
    ]
    local_offsets = user_offsets - user_offsets[0]
    users = pa.table(
        [
            histories.user_ids.slice(start, end - start),
            pa.array(splits[start:end]),
            pa.ListArray.from_arrays(
                pa.array(local_offsets), pa.StructArray.from_arrays(values, fields=list(schema.HISTORY))
            ),
            pa.array(
                [labels.get(user_id, []) for user_id in histories.user_ids.slice(start, end - start).to_pylist()],
                type=pa.map_(pa.string(), pa.string()),
            ),
        ],
        schema=schema.SHARD_USERS,
    )
    return users, dictionary, local_offsets, np.diff(history_offsets)


def _read_items(directory: Path, wanted: pa.Array) -> pa.Table:
    """Items that the bucket's events name, first occurrence of each id; the item table is scanned, never held."""
    files = sorted(str(path) for path in (directory / ITEMS).glob("part-*.parquet"))
    found = [schema.ITEMS.empty_table().select(["item_id", "text"])]
    if files:
        scan = pa.dataset.dataset(files, format="parquet").to_batches(
            columns=["item_id", "text"], batch_size=SCAN_BATCH_ROWS
        )
        for batch in scan:
            mask = pc.is_in(batch.column("item_id"), value_set=wanted)
            if pc.any(mask).as_py():
                found.append(pa.table(batch.filter(mask)).cast(found[0].schema))
    items = pa.concat_tables(found)
    _, first = np.unique(items["item_id"].combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True)
    return items.take(pa.array(first)).combine_chunks()


def _quarantine_unknown(
    events: pa.Table, item_refs: pa.Array, directory: Path, bucket: int
) -> tuple[pa.Table, np.ndarray, dict[str, int]]:
    """Moves events to quarantine whose item is not in the item table.

    An event of an item that was itself rejected is a good record that cannot be used: it is told apart, so that one bad
    item does not count as often as it was bought.
    """
    is_known = pc.is_valid(item_refs)
    unknown = events.filter(pc.invert(is_known))
    rejected_items = read_rejected_item_ids(directory) if unknown.num_rows else set()
    counts = {"unknown_item": 0, "rejected_item": 0}
    with ExitStack() as stack:
        writer = QuarantineWriter(directory, f"events-unknown-item-{bucket:05d}", stack)
        for batch in unknown.to_batches(max_chunksize=QUARANTINE_ROWS):
            records = []
            for row in batch.to_pylist():
                reason = "rejected_item" if row["item_id"] in rejected_items else "unknown_item"
                counts[reason] += 1
                record = (
                    f"user_id={row['user_id']} item_id={row['item_id']} service={row['service']} time={row['time']}"
                )
                origin = {"file": row["file"], "line": row["line"]}
                records.append({"table": "events", **origin, "id": None, "reason": reason, "record": record})
            writer.write(pa.Table.from_pylist(records, schema=schema.REJECTED))
    return events.filter(is_known), item_refs.filter(is_known).to_numpy(), counts


def _read_labels(directory: Path, bucket: int) -> dict[str, list[tuple[str, str]]]:
    users = read_spill(directory, "users", bucket)
    return dict(zip(users["user_id"].to_pylist(), users["labels"].to_pylist(), strict=True))
