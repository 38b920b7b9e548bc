"""A refreshed table is the rebuilt one, bit for bit; only who has other input is encoded. Without Ray."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.support.encoder_tables import TOKENIZER, write_clue
from tests.support.ingested import draw_shards
from tests.support.tokenized import Group, User, write_shards
from tests.support.two_tower import make_items, make_model
from userrep.data.views import merge_row_groups, read_row_group
from userrep.inference import ShardEncoder, embed_shards, encode_users
from userrep.manifest import FileEntry, Manifest, read_manifest, sha256_file, write_manifest
from userrep.publishing.inputs import INPUTS_NAME, has_inputs
from userrep.publishing.table import finish_table, verify_table, write_part
from userrep.publishing.verify import PART_NAME
from userrep.refresh import (
    CONTROLS,
    NOT_REPRODUCED,
    RefreshCounts,
    ShardRefresher,
    encoding_fact,
    rebuilt_counts,
    refresh_shards,
    total,
    why_not,
)
from userrep.training.encoders import TwoTowerEncoder

MAX_EVENTS = 4
FACTS = {"tokenizer_digest": TOKENIZER, "data_digest": "d" * 12, "code_version": "1"}


def commit_shards(directory: Path, shards: list[list[Group]]) -> None:
    facts = {"shards": write_shards(directory, shards), "tokenizer_digest": TOKENIZER}
    write_manifest(directory, Manifest(table="shards", stage="tokenize", config={}, facts=facts))


def next_day(shards: list[list[Group]]) -> tuple[list[list[Group]], RefreshCounts]:
    """Two users have a new event, one has a new service, one left, two came; some have only another label or time."""
    users = [[user for group in shard for user in group] for shard in shards]
    first, last = users[0], users[2]
    service, events = next(iter(first[1].histories.items()))
    first[1] = first[1]._replace(histories={**first[1].histories, service: [*events, ("i3", 9)]})
    service, events = next(iter(last[5].histories.items()))
    last[5] = last[5]._replace(histories={**last[5].histories, service: [*events, ("i4", 9)]})
    changed = {user.user_id for user in (first[1], last[5])}
    plain = next(n for n, user in enumerate(last) if len(user.histories) < 3 and user.user_id not in changed)
    missing = next(service for service in range(3) if service not in last[plain].histories)
    histories = {**last[plain].histories, missing: [("i5", 8)]}
    last[plain] = last[plain]._replace(histories=dict(sorted(histories.items())))
    first[2] = first[2]._replace(labels=(("gender", "X"),))
    num_old = sum(map(len, users))
    gone = next(n for n, user in enumerate(last) if n not in (5, plain))
    del last[gone]
    last.insert(0, User("newcomer", "train", {1: [("i0", 1), ("brand new item", 2)]}))
    users[1].append(User("the first one of a shard", "test", {0: [("i0", None)]}))
    cut = len(last) // 3
    layout = [[first[:4], first[4:]], [users[1]], [last[cut:], last[:cut]]]
    return [[group for group in shard if group] for shard in layout], RefreshCounts(2, 3, num_old - 4, 1)


def finish(
    directory: Path, encoder: Path, entries: list[FileEntry], dim: int, dtype: str, tasks: list[str]
) -> Manifest:
    parts = [entry for entry in entries if PART_NAME.fullmatch(entry.path)]
    facts = {**FACTS, "encoder_digest": read_manifest(encoder).digest(), "encoding": encoding_fact(MAX_EVENTS)}
    return finish_table(
        directory,
        parts=parts,
        input_files=[entry for entry in entries if entry not in parts],
        dim=dim,
        dtype=dtype,
        tasks=tasks,
        facts=facts,
        config={},
        inputs={},
    )


def entries_in(row: dict[str, Any]) -> list[FileEntry]:
    return [FileEntry.parse(values) for values in json.loads(row["entries"])]


def full(directory: Path, encoder: Path, shards: Path, dtype: str, tasks: list[str], dim: int = 8) -> Manifest:
    directory.mkdir()
    actor = ShardEncoder(str(encoder), str(shards), str(directory), MAX_EVENTS, dtype, 1)
    entries = [
        entry for n in range(len(read_manifest(shards).facts["shards"])) for entry in entries_in(actor({"id": n}))
    ]
    return finish(directory, encoder, entries, dim, dtype, tasks)


def refreshed(
    directory: Path, encoder: Path, shards: Path, old: Path, dtype: str, num_lanes: int
) -> tuple[list[FileEntry], list[dict[str, Any]]]:
    directory.mkdir()
    num_shards = len(read_manifest(shards).facts["shards"])
    paths = [str(path) for path in (encoder, shards, old, directory)]
    actor = ShardRefresher(*paths, MAX_EVENTS, dtype, num_shards, num_lanes, 1)
    rows = [actor({"id": lane}) for lane in range(num_lanes)]
    return [entry for row in rows for entry in entries_in(row)], rows


@pytest.mark.parametrize(
    ("dtype", "is_taught", "num_lanes"),
    [("float32", False, 1), ("float32", True, 2), ("float16", False, 3), ("int8", True, 1)],
)
def test_a_refreshed_table_is_the_rebuilt_one(tmp_path: Path, dtype: str, is_taught: bool, num_lanes: int) -> None:
    tasks = ["gender", "age"] if is_taught else []
    encoder = tmp_path / "encoder"
    write_clue(encoder, is_taught=is_taught)
    before = draw_shards(3, num_users=80)
    commit_shards(tmp_path / "yesterday", before)
    after, expected = next_day(before)
    commit_shards(tmp_path / "today", after)
    full(tmp_path / "old", encoder, tmp_path / "yesterday", dtype, tasks)
    rebuilt = full(tmp_path / "rebuilt", encoder, tmp_path / "today", dtype, tasks)
    entries, rows = refreshed(tmp_path / "new", encoder, tmp_path / "today", tmp_path / "old", dtype, num_lanes)
    counts = total([RefreshCounts(**json.loads(row["counts"])) for row in rows])
    assert counts == expected
    assert sum(row["num_encoded"] for row in rows) <= counts.new + counts.changed + num_lanes * CONTROLS
    new = finish(tmp_path / "new", encoder, entries, 8, dtype, tasks)
    assert new.facts["table_sha256"] == rebuilt.facts["table_sha256"]
    for entry in rebuilt.files:
        if entry.path.endswith(".parquet"):
            assert sha256_file(tmp_path / "new" / entry.path) == entry.sha256, entry.path
    assert has_inputs(verify_table(tmp_path / "new"))
    assert sum(bool(INPUTS_NAME.fullmatch(entry.path)) for entry in new.files) == 3
    by_ids = rebuilt_counts(tmp_path / "old", list(rebuilt.files), tmp_path / "rebuilt")
    assert (by_ids.new, by_ids.removed, by_ids.unchanged) == (expected.new, expected.removed, 0)


def test_a_table_with_other_bits_is_noticed(tmp_path: Path) -> None:
    encoder, shards, old = tmp_path / "encoder", tmp_path / "shards", tmp_path / "old"
    write_clue(encoder)
    commit_shards(shards, draw_shards(3))
    manifest = full(old, encoder, shards, "float32", [])
    part = pq.read_table(old / "part-00000.parquet")
    vectors = np.stack(part["embedding"].to_numpy())
    nudged = np.nextafter(vectors, np.float32(2))
    column = pa.FixedSizeListArray.from_arrays(pa.array(nudged.ravel()), 8)
    write_part(old, 0, part.set_column(1, part.schema.field("embedding"), column))
    assert manifest.facts["rows"] > 0
    entries, rows = refreshed(tmp_path / "new", encoder, shards, old, "float32", 1)
    assert (entries, rows[0]["problem"]) == ([], NOT_REPRODUCED)
    assert not list((tmp_path / "new").iterdir())


def test_what_makes_an_earlier_table_useless(tmp_path: Path) -> None:
    encoder, shards = tmp_path / "encoder", tmp_path / "shards"
    write_clue(encoder)
    commit_shards(shards, draw_shards(3))
    old = full(tmp_path / "old", encoder, shards, "float32", [])
    wanted = {
        "encoder_digest": read_manifest(encoder).digest(),
        "tokenizer_digest": TOKENIZER,
        "dtype": "float32",
        "tasks": None,
        "encoding": encoding_fact(MAX_EVENTS),
    }
    assert why_not(old, encoder, shards, wanted) == ""
    for key, other in (
        ("encoder_digest", "other"),
        ("tokenizer_digest", "other"),
        ("dtype", "float16"),
        ("tasks", ["gender"]),
        ("encoding", encoding_fact(MAX_EVENTS + 1)),
    ):
        assert why_not(old, encoder, shards, {**wanted, key: other}) == f"{key} is another"
    without = old.model_copy(update={"files": tuple(f for f in old.files if not INPUTS_NAME.fullmatch(f.path))})
    assert "does not say what its users were encoded from" in why_not(without, encoder, shards, wanted)
    commit_shards(tmp_path / "more", [*draw_shards(3), []])
    assert why_not(old, encoder, tmp_path / "more", wanted) == "it has 3 parts, and there are 4 shards"


def test_the_vectors_of_a_two_tower_model_are_stable_too(tmp_path: Path) -> None:
    items = make_items()
    encoder = TwoTowerEncoder(make_model(items).float().eval(), items)
    users = [User(f"u{n}", "train", {0: [(f"i{n * 7 % 30}", 1)], 1: [(f"i{n * 3 % 30}", 1)]}) for n in range(40)]
    write_shards(tmp_path, [[users], [[user] for user in users[:12]]])
    whole = encode_users(encoder, read_row_group(tmp_path, 0, 0), 3)
    alone = np.concatenate([encode_users(encoder, read_row_group(tmp_path, 1, n), 3) for n in range(12)])
    np.testing.assert_array_equal(alone, whole[:12])


@pytest.mark.parametrize("dim", [8, 32, 96])
def test_a_user_has_the_same_bits_in_any_company(tmp_path: Path, dim: int) -> None:
    from userrep.training.encoders import open_encoder

    write_clue(tmp_path / "encoder", dim=dim)
    encoder = open_encoder(tmp_path / "encoder")
    users = [user for shard in draw_shards(1, num_users=60) for group in shard for user in group]
    rng = np.random.default_rng(0)
    write_shards(
        tmp_path / "s", [[users], [[users[n]] for n in range(10)], [[users[n] for n in rng.permutation(60)[:23]]]]
    )
    whole_group = read_row_group(tmp_path / "s", 0, 0)
    whole = dict(zip(whole_group.user_ids.to_pylist(), encode_users(encoder, whole_group, 4), strict=True))
    others = [read_row_group(tmp_path / "s", 1, n) for n in range(10)] + [read_row_group(tmp_path / "s", 2, 0)]
    threads = torch.get_num_threads()
    for group in [*others, merge_row_groups(others[:10])[0]]:
        torch.set_num_threads(3)
        vectors = encode_users(encoder, group, 4)
        torch.set_num_threads(threads)
        for name, vector in zip(group.user_ids.to_pylist(), vectors, strict=True):
            np.testing.assert_array_equal(vector, whole[name])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_as_without(tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    write_clue(encoder, is_taught=True)
    before = draw_shards(3, num_users=80)
    after, expected = next_day(before)
    for day, shards in (("yesterday", before), ("today", after)):
        commit_shards(tmp_path / day, shards)
        (tmp_path / f"table of {day}").mkdir()
        entries = embed_shards(
            encoder, tmp_path / day, tmp_path / f"table of {day}", MAX_EVENTS, "float32", lambda *_: None
        )
        finish(tmp_path / f"table of {day}", encoder, entries, 8, "float32", ["gender", "age"])
    (tmp_path / "new").mkdir()
    progress: list[tuple[int, int, int]] = []
    paths = [encoder, tmp_path / "today", tmp_path / "table of yesterday", tmp_path / "new"]
    entries, counts, problem = refresh_shards(*paths, MAX_EVENTS, "float32", lambda *done: progress.append(done))
    new = finish(tmp_path / "new", encoder, entries, 8, "float32", ["gender", "age"])
    assert (counts, problem) == (expected, "")
    assert new.facts["table_sha256"] == read_manifest(tmp_path / "table of today").facts["table_sha256"]
    assert progress[-1][2] == new.facts["rows"]


@pytest.mark.slow
def test_five_percent_of_changed_users_take_a_tenth_of_the_time(tmp_path: Path) -> None:
    """One lane of eight shards of a thousand users, both ways in this process, in CPU seconds."""
    rng = np.random.default_rng(0)
    users = [
        User(f"user {n}", "train", {s: [(f"i{i}", k) for k, i in enumerate(rng.zipf(1.3, 20) % 3000)] for s in (0, 1)})
        for n in range(8000)
    ]
    shards = [[users[start : start + 1000]] for start in range(0, 8000, 1000)]
    commit_shards(tmp_path / "yesterday", shards)
    changed = set(rng.choice(8000, 400, replace=False).tolist())
    for n in changed:
        user = users[n]
        users[n] = user._replace(histories={**user.histories, 1: [*user.histories[1], ("i77", 99)]})
    commit_shards(tmp_path / "today", [[users[start : start + 1000]] for start in range(0, 8000, 1000)])
    encoder = tmp_path / "encoder"
    write_clue(encoder, dim=128)
    full(tmp_path / "old", encoder, tmp_path / "yesterday", "float32", [], dim=128)
    started = time.process_time()
    rebuilt = full(tmp_path / "rebuilt", encoder, tmp_path / "today", "float32", [], dim=128)
    full_s = time.process_time() - started
    started = time.process_time()
    entries, rows = refreshed(tmp_path / "new", encoder, tmp_path / "today", tmp_path / "old", "float32", 1)
    new = finish(tmp_path / "new", encoder, entries, 128, "float32", [])
    refresh_s = time.process_time() - started
    assert json.loads(rows[0]["counts"]) == {"new": 0, "changed": 400, "unchanged": 7600, "removed": 0}
    assert rows[0]["num_encoded"] == 400 + CONTROLS
    assert new.facts["table_sha256"] == rebuilt.facts["table_sha256"]
    assert refresh_s <= 0.1 * full_s, f"{refresh_s:.1f} s of {full_s:.1f} s"
