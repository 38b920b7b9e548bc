"""Digests of what an encoder reads: the same in every layout of shards, another one for every other input."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from tests.support.ingested import draw_shards
from tests.support.tokenized import Event, User, write_shards
from userrep.data.input_digests import input_digests, sequence_digests
from userrep.data.selection import select_users
from userrep.data.views import RowGroup, merge_row_groups, read_row_group
from userrep.task_vectors import recent_items


def read(directory: Path, users: list[User]) -> RowGroup:
    write_shards(directory, [[users]])
    return read_row_group(directory, 0, 0)


def one(tmp_path: Path, *histories: str, number: int = 0) -> User:
    def events(items: str) -> list[Event]:
        return [(item, place) for place, item in enumerate(items)]

    return User(f"u{number}", "train", {service: events(items) for service, items in enumerate(histories) if items})


def test_sequences_differ_by_value_order_and_length() -> None:
    sequences = [list(p) for size in (1, 2, 3, 4) for p in permutations([0, 1, 2, 3], size)] + [[0, 0], [0, 0, 0]]
    offsets = np.cumsum([0, *map(len, sequences)])
    digests = sequence_digests(np.concatenate(sequences), offsets)
    assert len(set(digests.tolist())) == len(sequences)
    for number in (0, 7, len(sequences) - 1):  # each by itself is what it is among the others
        alone = sequence_digests(np.array(sequences[number]), np.array([0, len(sequences[number])]))
        assert alone[0] == digests[number]
    assert len(sequence_digests(np.zeros(0, dtype=np.int64), np.zeros(1, dtype=np.int64))) == 0


def test_no_two_of_many_random_sequences_share_a_digest() -> None:
    values = np.random.default_rng(0).integers(0, 4, 400_000)
    offsets = np.arange(0, 400_001, 20)
    rows = np.unique(values.reshape(-1, 20), axis=0)
    assert len(np.unique(sequence_digests(values, offsets))) == len(rows)


@pytest.mark.parametrize("max_items", [None, 3])
def test_the_layout_of_shards_does_not_matter(tmp_path: Path, max_items: int | None) -> None:
    def digests(group: RowGroup) -> dict[str, int]:
        recent = None if max_items is None else recent_items(group, max_items)
        found = input_digests(group, 4, recent_NL=recent)
        return dict(zip(group.user_ids.to_pylist(), found.tolist(), strict=True))

    users = [user for shard in draw_shards(5) for group in shard for user in group]
    whole = read(tmp_path / "whole", users)
    expected = digests(whole)
    write_shards(tmp_path / "cut", [[users[30:]], [users[7:30], users[:7]]])
    parts = [read_row_group(tmp_path / "cut", shard, group) for shard, group in ((0, 0), (1, 0), (1, 1))]
    assert {name: value for part in parts for name, value in digests(part).items()} == expected
    assert digests(merge_row_groups(parts)[0]) == expected
    chosen = np.array([33, 2, 17])
    assert list(digests(select_users(whole, chosen)).values()) == [list(expected.values())[n] for n in chosen]


def test_only_what_is_read_counts(tmp_path: Path) -> None:
    base = one(tmp_path, "abcdef", "gh")
    same = [
        one(tmp_path, "zzabcdef", "gh"),  # older events than the last six
        base._replace(labels=(("gender", "F"),), split="test"),
        base._replace(histories={0: [(item, None) for item, _ in base.histories[0]], 5: base.histories[1]}),
    ]
    other = [
        one(tmp_path, "abcdefg", "gh"),
        one(tmp_path, "abcdfe", "gh"),
        one(tmp_path, "abcdef", "hg"),
        one(tmp_path, "gh", "abcdef"),
        one(tmp_path, "abcdef"),
        one(tmp_path, "abcde", "fgh"),
    ]
    users = [user._replace(user_id=f"u{n}") for n, user in enumerate([base, *same, *other])]
    digests = input_digests(read(tmp_path / "s", users), 6).tolist()
    assert digests[: 1 + len(same)] == [digests[0]] * (1 + len(same))
    assert len(set(digests)) == 1 + len(other)


def test_an_encoder_that_knows_items_by_id_sees_another_id_and_no_other_text(tmp_path: Path) -> None:
    group = read(tmp_path / "s", [one(tmp_path, "ab")])
    retold = replace(group, tokens=group.tokens + 1)
    assert input_digests(retold, 6)[0] != input_digests(group, 6)[0]
    assert input_digests(retold, 6, by_id=True)[0] == input_digests(group, 6, by_id=True)[0]
    renamed = read(tmp_path / "other", [one(tmp_path, "ac")])
    assert input_digests(renamed, 6, by_id=True)[0] != input_digests(group, 6, by_id=True)[0]
