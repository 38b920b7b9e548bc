"""Shards without some users are the shards of the others; killed anywhere, the erasure can be run again."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.ingested import draw_shards
from tests.support.tokenized import Group, User, write_shards
from userrep.data.assemble import users_file
from userrep.data.erase import erase_shards
from userrep.data.views import read_row_group
from userrep.erasure.replace import erase_table, interrupted, recover
from userrep.manifest import Manifest, describe_file, read_manifest, verify_files, write_manifest

QUARANTINED = '{"record": "user_id=user 3 item_id=i9"}\n{"record": "user_id=user 33 item_id=i9"}\n'


def commit(directory: Path, shards: list[list[Group]], has_tokens: bool) -> Manifest:
    facts = write_shards(directory, shards, has_tokens=has_tokens)
    events = [sum(len(h) for group in shard for user in group for h in user.histories.values()) for shard in shards]
    facts = [{**fact, "events": count} for fact, count in zip(facts, events, strict=True)]
    if not has_tokens:
        (directory / "quarantine").mkdir()
        (directory / "quarantine" / "events-00000.jsonl").write_text(QUARANTINED)
    files = tuple(describe_file(directory, path) for path in sorted(directory.rglob("*.*")))
    table = "shards" if has_tokens else "shards_text"
    users = sum(fact["users"] for fact in facts)
    items = sum(group["items"] for fact in facts for group in fact["row_groups"])
    totals = (
        {"users": users, "rows": items, "events": sum(events)} if has_tokens else {"users": users, "rows": sum(events)}
    )
    write_manifest(
        directory,
        Manifest(table=table, stage="x", config={}, files=files, facts={**totals, "users": users, "shards": facts}),
    )
    return read_manifest(directory)


def without(shards: list[list[Group]], ids: list[str]) -> list[list[Group]]:
    kept = [[[user for user in group if user.user_id not in ids] for group in shard] for shard in shards]
    return [[group for group in shard if group] for shard in kept]


def contents(directory: Path, shards: list[list[Group]], has_tokens: bool) -> list[list[dict]]:
    """Every row group as plain rows, with items by their ids and content."""
    found = []
    for shard in range(len(shards)):
        users = pq.ParquetFile(directory / users_file(shard))
        for number in range(users.num_row_groups):
            items = pq.ParquetFile(directory / users_file(shard).replace("users", "items")).read_row_group(number)
            rows, dictionary = users.read_row_group(number).to_pylist(), items.to_pylist()
            for row in rows:
                for history in row["histories"]:
                    history["items"] = [dictionary[reference] for reference in history["items"]]
            found.append([*rows, {"dictionary": [item["item_id"] for item in dictionary]}])
    return found


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("ids", [["user 3"], [f"user {n}" for n in range(0, 40, 3)], ["user 0", "nobody"]])
def test_what_is_left_is_what_the_others_would_be_alone(tmp_path: Path, has_tokens: bool, ids: list[str]) -> None:
    shards = draw_shards(4)
    before = commit(tmp_path / "table", shards, has_tokens)
    expected = commit(tmp_path / "expected", without(shards, ids), has_tokens)
    done = erase_table(tmp_path / "table", pa.array(ids), erase_shards)
    assert done is not None
    after = read_manifest(tmp_path / "table")
    assert contents(tmp_path / "table", shards, has_tokens) == contents(tmp_path / "expected", shards, has_tokens)
    assert {**after.facts, "erased_from": None} == {**expected.facts, "erased_from": None}
    assert after.lineage() == before.lineage() == before.digest() != after.digest()
    verify_files(tmp_path / "table", after)
    if ids == ["user 3"] and not has_tokens:
        text = (tmp_path / "table" / "quarantine" / "events-00000.jsonl").read_text()
        assert text == QUARANTINED.splitlines(keepends=True)[1]
    assert erase_table(tmp_path / "table", pa.array(ids), erase_shards) is None
    assert read_manifest(tmp_path / "table") == after
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "table"]


def test_a_table_without_the_user_is_not_touched(tmp_path: Path) -> None:
    before = commit(tmp_path / "table", draw_shards(4), has_tokens=True)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "table").iterdir()}
    assert erase_table(tmp_path / "table", pa.array(["nobody"]), erase_shards) is None
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "table").iterdir()} == stamps
    assert read_manifest(tmp_path / "table") == before


@pytest.mark.parametrize("kill_at", range(4))
def test_killed_between_any_two_renames_the_table_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    shards = [[[User("user 1", "train", {0: [("a", 1)]}), User("user 2", "train", {0: [("b", 1)]})]]]
    commit(tmp_path / "table", shards, has_tokens=True)
    calls, replace = [], os.replace

    def dying(source: object, target: object) -> None:
        calls.append(target)
        if len(calls) - 1 == kill_at:
            raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        try:
            erase_table(tmp_path / "table", pa.array(["user 1"]), erase_shards)
        except KeyboardInterrupt:
            assert interrupted(tmp_path) == [tmp_path / "table"]
            assert tmp_path / "table" in interrupted(tmp_path.parent, max_depth=2)
            recover(tmp_path / "table")
            verify_files(tmp_path / "table", read_manifest(tmp_path / "table"))
    erase_table(tmp_path / "table", pa.array(["user 1"]), erase_shards)
    verify_files(tmp_path / "table", read_manifest(tmp_path / "table"))
    assert read_row_group(tmp_path / "table", 0, 0).user_ids.to_pylist() == ["user 2"]
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
