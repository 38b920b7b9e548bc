"""Shards without some users: their histories, and the items that nobody else has."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from userrep.data.assemble import count_samples, items_file, users_file
from userrep.data.parse import QUARANTINE
from userrep.erasure.replace import Erased, Rewriter, erase_files, keep
from userrep.erasure.rewriters import erase_lines
from userrep.manifest import Manifest, describe_file


def erase_shards(directory: Path, staging: Path, manifest: Manifest, ids: pa.Array) -> Erased | None:
    """Eraser of ingested and of tokenized shards; a shard's row groups without users are gone.

    Document frequencies, tokenizer and features stay: they are counted over all users, and name none.
    """
    facts, of_shard, num_rows = [], dict[str, Path](), 0
    for shard in manifest.facts["shards"]:
        number = shard["shard"]
        if (new := _erase_shard(directory, staging, number, ids)) is not None:
            num_rows += shard["users"] - new["users"]
            of_shard |= {name: staging / name for name in (users_file(number), items_file(number))}
            shard = {**shard, **new}
        facts.append(shard)
    files, num_lines = erase_files(directory, staging, manifest.files, ids, _rewriter)
    if not num_rows and not num_lines:
        return None
    entries = tuple(describe_file(staging, of_shard[e.path], e.rows) if e.path in of_shard else e for e in files)
    totals = _totals(manifest, facts)
    new = manifest.model_copy(update={"files": entries, "facts": {**manifest.facts, **totals, "shards": facts}})
    return Erased(new, num_rows + num_lines)


def _rewriter(path: str) -> Rewriter:
    return erase_lines if path.startswith(f"{QUARANTINE}/") else keep


def _totals(manifest: Manifest, shards: list[dict[str, Any]]) -> dict[str, int]:
    users = sum(shard["users"] for shard in shards)
    events = sum(shard["events"] for shard in shards if "events" in shard)
    items = sum(group["items"] for shard in shards for group in shard["row_groups"])
    wanted = {"users": users, "events": events, "rows": items if manifest.table == "shards" else events}
    return {name: value for name, value in wanted.items() if name in manifest.facts}


def _erase_shard(directory: Path, staging: Path, shard: int, ids: pa.Array) -> dict[str, Any] | None:
    """Writes a shard without the users. Returns its facts; None: it has none of them, and nothing is written."""
    users_path, items_path = directory / users_file(shard), directory / items_file(shard)
    names = pq.read_table(users_path, columns=["user_id"])["user_id"]
    if not pc.any(pc.is_in(names, value_set=ids)).as_py():
        return None
    row_groups, num_events = [], 0
    with (
        pq.ParquetFile(users_path) as users,
        pq.ParquetFile(items_path) as items,
        pq.ParquetWriter(staging / users_path.name, users.schema_arrow, compression="zstd") as users_writer,
        pq.ParquetWriter(staging / items_path.name, items.schema_arrow, compression="zstd") as items_writer,
    ):
        for number in range(users.num_row_groups):
            rows = users.read_row_group(number)
            kept = rows.filter(pc.invert(pc.is_in(rows["user_id"], value_set=ids))).combine_chunks()
            if not kept.num_rows:
                continue
            kept, used = _renumbered(kept)
            dictionary = items.read_row_group(number).take(pa.array(used))
            users_writer.write_table(kept, row_group_size=kept.num_rows)
            items_writer.write_table(dictionary, row_group_size=max(1, dictionary.num_rows))
            facts, events = _group_facts(kept, len(used))
            row_groups.append(facts)
            num_events += events
    return {"users": sum(group["rows"] for group in row_groups), "events": num_events, "row_groups": row_groups}


def _renumbered(users: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """The users over a dictionary of the items that they have, and which those are, (U,)."""
    histories = users["histories"].combine_chunks()
    events = histories.values
    items = events.field("items")
    used, references = np.unique(items.values.to_numpy(), return_inverse=True)
    new_items = pa.ListArray.from_arrays(items.offsets, pa.array(references.astype(np.int32)))
    fields = [new_items if field.name == "items" else events.field(field.name) for field in events.type]
    renewed = pa.ListArray.from_arrays(histories.offsets, pa.StructArray.from_arrays(fields, fields=list(events.type)))
    place = users.schema.get_field_index("histories")
    return users.set_column(place, users.schema.field("histories"), renewed.cast(histories.type)), used


def _group_facts(users: pa.Table, num_items: int) -> tuple[dict[str, Any], int]:
    histories = users["histories"].combine_chunks()
    lengths = np.diff(histories.values.field("items").offsets.to_numpy())
    samples = count_samples(histories.offsets.to_numpy(), lengths, users["split"].to_numpy())
    return {"rows": users.num_rows, "items": num_items, "samples": samples}, int(lengths.sum())
