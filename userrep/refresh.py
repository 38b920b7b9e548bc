"""A table of users from an earlier one: who has new events is encoded, and all others keep their vectors.

The result is the table that a full rebuild makes, bit for bit: vectors do not depend on who else is in a batch
(`models/row_stable.py`), digests say whose input is unchanged (`data/input_digests.py`), and some unchanged users are
encoded again in every lane and compared with what they had, so that a table from another kind of machine is noticed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from userrep import storage
from userrep.data.assemble import users_file
from userrep.data.input_digests import DIGEST_VERSION
from userrep.data.selection import select_users
from userrep.data.views import RowGroup, merge_row_groups, read_row_group
from userrep.inference import UserEncoder, entries_of, event_facts, num_actors, run_actors, written
from userrep.manifest import FileEntry, Manifest, read_manifest
from userrep.publishing.inputs import INPUTS, has_inputs, read_inputs, write_inputs
from userrep.publishing.rows import checked_rows, int8_rows
from userrep.publishing.table import write_part
from userrep.publishing.verify import part_entries
from userrep.training.encoders import open_encoder

ENCODE_USERS = 1024  # encoded at once; users who share items share their encoding
CONTROLS = 32  # unchanged users of a lane that are encoded again


NOT_REPRODUCED = "users whose events are unchanged have other bits here than in it: it was made on another machine"


@dataclass(frozen=True)
class RefreshCounts:
    """Users of the new table by what became of them, and those who left it."""

    new: int
    changed: int
    unchanged: int
    removed: int


def encoding_fact(max_events: int) -> dict[str, Any]:
    """What the bits of a vector depend on besides the encoder and the user; a fact of the table."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"max_events": max_events, "digests": DIGEST_VERSION, "torch": torch.__version__, "cpu": capability}


def why_not(old: Manifest, encoder: Path, shards: Path, facts: Mapping[str, Any]) -> str:
    """Why no vector of an earlier table can be kept; empty where they can.

    Args:
        old: manifest of the earlier table.
        encoder: directory of the encoder.
        shards: directory of the tokenized shards.
        facts: of the new table, those of `KEYS` among them.
    """
    if not open_encoder(encoder).is_row_stable:
        return "with this kind of encoder, the last bits of a vector depend on the other users of a batch"
    if not has_inputs(old):
        return "it does not say what its users were encoded from (`userrep embed` writes that since this version)"
    if (found := len(part_entries(old))) != (wanted := len(read_manifest(shards).facts["shards"])):
        return f"it has {found} parts, and there are {wanted} shards"
    differing = [key for key in KEYS if old.facts.get(key) != facts.get(key)]
    return f"{', '.join(differing)} {'is' if len(differing) == 1 else 'are'} another" if differing else ""


KEYS = ("encoder_digest", "tokenizer_digest", "dtype", "tasks", "encoding")


class ShardRefresher:
    """Ray Data actor: the number of a lane in, the entries of the files of its shards out."""

    def __init__(
        self,
        encoder: str,
        shards: str,
        old: str,
        target: str,
        max_events: int,
        dtype: str,
        num_shards: int,
        num_lanes: int,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self._encoder = UserEncoder(Path(encoder), max_events, dtype)
        self._shards, self._old, self._target = storage.fetch(Path(shards)), Path(old), Path(target)
        self._target.mkdir(parents=True, exist_ok=True)
        self._dtype, self._num_shards, self._num_lanes = dtype, num_shards, num_lanes

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Encodes the new and changed users of a lane's shards together, then writes shard by shard.

        Memory is bounded by the users that are encoded, and the vectors of one shard. Nothing is written where an
        unchanged user has other bits now than in the earlier table; then `problem` says so.
        """
        lane = _Lane(self._encoder, self._shards, self._old)
        numbers = range(int(row["id"]), self._num_shards, self._num_lanes)
        for shard in numbers:
            lane.read(shard)
        fresh = lane.encode()
        entries: list[FileEntry] = []
        if fresh is None:
            return written(entries, counts="{}", problem=NOT_REPRODUCED, num_encoded=lane.num_encoded)
        for shard in numbers:
            entries += self._write(shard, lane, fresh)
        return written(entries, counts=json.dumps(vars(lane.counts())), problem="", num_encoded=lane.num_encoded)

    def _write(self, shard: int, lane: "_Lane", fresh: pa.Table) -> list[FileEntry]:
        inputs, facts = lane.inputs[shard], lane.facts[shard]
        is_fresh = pc.is_in(fresh["user_id"], value_set=inputs["user_id"].combine_chunks())
        encoded, error = checked_rows(fresh.filter(is_fresh)), None
        if self._dtype == "int8":
            encoded, error = int8_rows(encoded)
        kept = _kept_rows(
            self._old,
            shard,
            facts.filter(pc.invert(pc.is_in(facts["user_id"], value_set=encoded["user_id"].combine_chunks()))),
        )
        entry = write_part(self._target, shard, pa.concat_tables([encoded, kept]))
        entries = [entry.model_copy(update={"quantisation": error}), write_inputs(self._target, shard, inputs)]
        storage.send(self._target, *(one.path for one in entries))
        return entries


class _Lane:
    """Some shards: what is known of their users, and who of them must be encoded."""

    def __init__(self, encoder: UserEncoder, shards: Path, old: Path) -> None:
        self._encoder, self._shards, self._old = encoder, shards, old
        self._todo: list[RowGroup] = []
        self._controls: list[RowGroup] = []
        self._num_controls = self._num_removed = 0
        self._is_new: list[np.ndarray] = []  # of those to do
        self.inputs: dict[int, pa.Table] = {}
        self.facts: dict[int, pa.Table] = {}
        self.num_encoded = 0

    def read(self, shard: int) -> None:
        """Reads a shard and compares it with the part of the earlier table; keeps the users that need a new vector."""
        before = read_inputs(self._old, shard)
        old_ids, old_digests = (column.combine_chunks() for column in before.columns)
        inputs, facts, num_known = [INPUTS.empty_table()], [event_facts(None)], 0
        for number in range(pq.ParquetFile(self._shards / users_file(shard)).num_row_groups):
            group = read_row_group(self._shards, shard, number)
            inputs.append(self._encoder.inputs(group).cast(INPUTS))
            facts.append(event_facts(group))
            places = pc.fill_null(pc.index_in(group.user_ids, value_set=old_ids), -1).to_numpy()
            is_known = places >= 0
            is_same = is_known.copy()
            digests = inputs[-1]["digest"].to_numpy()
            is_same[is_known] = digests[is_known] == old_digests.to_numpy()[places[is_known]]
            num_known += int(is_known.sum())
            self._sort_out(group, is_same, is_known)
        self._num_removed += len(old_ids) - num_known
        self.inputs[shard], self.facts[shard] = pa.concat_tables(inputs), pa.concat_tables(facts)

    def encode(self) -> pa.Table | None:
        """Rows of the new and changed users; None where unchanged ones do not get the vectors that they had."""
        blocks = _blocks([*self._controls, *self._todo])
        rows = pa.concat_tables([self._encoder.schema.empty_table(), *map(self._encoder.rows, blocks)])
        self.num_encoded = rows.num_rows
        return rows[self._num_controls :] if self._is_reproduced(rows[: self._num_controls]) else None

    def counts(self) -> RefreshCounts:
        """Of the users of these shards."""
        num_todo, num_new = sum(map(len, self._is_new)), int(sum(map(np.sum, self._is_new)))
        num_users = sum(facts.num_rows for facts in self.facts.values())
        return RefreshCounts(num_new, num_todo - num_new, num_users - num_todo, self._num_removed)

    def _sort_out(self, group: RowGroup, is_same: np.ndarray, is_known: np.ndarray) -> None:
        todo = np.flatnonzero(~is_same)
        if len(todo):
            self._todo.append(select_users(group, todo))
            self._is_new.append(~is_known[todo])
        controls = np.flatnonzero(is_same)[: CONTROLS - self._num_controls]
        if len(controls):
            self._controls.append(select_users(group, controls))
            self._num_controls += len(controls)

    def _is_reproduced(self, controls: pa.Table) -> bool:
        rows = checked_rows(controls)
        if self._encoder.dtype == "int8":
            rows, _ = int8_rows(rows)
        for shard, facts in self.facts.items():
            of_shard = rows.filter(pc.is_in(rows["user_id"], value_set=facts["user_id"].combine_chunks()))
            if of_shard.num_rows and not of_shard.equals(
                _kept_rows(self._old, shard, of_shard.select(facts.schema.names))
            ):
                return False
        return True


def refresh_shards(
    encoder: Path,
    shards: Path,
    old: Path,
    target: Path,
    max_events: int,
    dtype: str,
    progress: Callable[[int, int, int], None],
) -> tuple[list[FileEntry], RefreshCounts, str]:
    """Writes the parts that `inference.embed_shards` would write, from those of an earlier table.

    Args:
        encoder: directory of the encoder.
        shards: directory of the tokenized shards.
        old: directory of the earlier table, about which `why_not` has nothing to say.
        target: where the files go.
        max_events: most recent events of each history.
        dtype: of the vectors.
        progress: called in the driver as lanes are done.

    Returns:
        Entries of all files; what became of users; and why nothing can be kept of the earlier table, empty where it
        can: it was made on another kind of machine, as the users show who were encoded again to see that.
    """
    num_shards = len(read_manifest(shards).facts["shards"])
    num_lanes = num_actors(num_shards)
    paths = {"encoder": str(encoder), "shards": str(shards), "old": str(old), "target": str(target)}
    sizes = {"max_events": max_events, "dtype": dtype, "num_shards": num_shards, "num_lanes": num_lanes}
    done = run_actors(ShardRefresher, {**paths, **sizes}, num_lanes, progress)
    if problem := next((row["problem"] for row in done if row["problem"]), ""):
        return [], RefreshCounts(0, 0, 0, 0), problem
    return entries_of(done), total([RefreshCounts(**json.loads(row["counts"])) for row in done]), ""


def total(counts: Sequence[RefreshCounts]) -> RefreshCounts:
    """The sum of several counts."""
    return RefreshCounts(*(sum(column) for column in zip(*(vars(one).values() for one in counts), strict=True)))


def rebuilt_counts(old: Path, entries: Sequence[FileEntry], target: Path) -> RefreshCounts:
    """Who is new and who left where all were encoded; everybody else counts as changed."""
    before, after = (
        pc.unique(
            pa.chunked_array(
                [pq.read_table(path, columns=["user_id"])["user_id"].combine_chunks() for path in paths], pa.string()
            )
        )
        for paths in (
            [old / entry.path for entry in part_entries(read_manifest(old))],
            [target / entry.path for entry in entries if entry.path.startswith("part-")],
        )
    )
    num_both = pc.sum(pc.is_in(after, value_set=before)).as_py() or 0
    return RefreshCounts(len(after) - num_both, num_both, 0, len(before) - num_both)


def _kept_rows(old: Path, shard: int, facts: pa.Table) -> pa.Table:
    """Rows of users as in the earlier table, but with today's number and time of events, in the order of `facts`."""
    part = pq.read_table(old / f"part-{shard:05d}.parquet").combine_chunks()
    rows = part.take(pc.index_in(facts["user_id"].combine_chunks(), value_set=part["user_id"].combine_chunks()))
    columns = [(facts if name in facts.schema.names else rows)[name] for name in part.schema.names]
    return pa.table(columns, schema=part.schema)


def _blocks(groups: Sequence[RowGroup]) -> list[RowGroup]:
    """Row groups put together up to `ENCODE_USERS` users."""
    blocks, waiting = list[RowGroup](), list[RowGroup]()
    for group in groups:
        if waiting and sum(len(one.keys) for one in waiting) + len(group.keys) > ENCODE_USERS:
            blocks.append(merge_row_groups(waiting)[0])
            waiting = []
        waiting.append(group)
    return [*blocks, merge_row_groups(waiting)[0]] if waiting else blocks
