from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from userrep.data.tasks import TaskSet, TaskSplit
from userrep.data.ttl import TtlTask, read_ttl, ttl_tasks

LENGTH = 5
# A user of the file: the items, oldest first, without pads; and the targets.
User = tuple[list[int], list[int]]
ITEMS = st.lists(st.integers(1, 40), max_size=LENGTH)
USERS = st.lists(st.tuples(ITEMS, st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=4)), min_size=1, max_size=12)


def line(user: User, has_targets: bool = True) -> str:
    padded = [0] * (LENGTH - len(user[0])) + user[0]
    text = ",".join(map(str, padded))
    return text + ",," + ",".join(map(str, user[1])) if has_targets else text


@given(USERS, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, users: list[User], newline: str, has_newline: bool, has_targets: bool
):
    path = tmp_path_factory.mktemp("ttl") / "task.csv"
    text = newline.join(line(user, has_targets) for user in users)
    path.write_bytes((text + newline * has_newline).encode())
    rows = read_ttl(path, has_targets)
    assert rows.items.dtype == np.int32
    assert [[item for item in row if item] for row in rows.items.tolist()] == [items for items, _ in users]
    expected = [(number, target) for number, (_, targets) in enumerate(users) for target in targets]
    found = list(zip(rows.lines.tolist(), rows.targets.tolist(), strict=True))
    assert found == (expected if has_targets else [])


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("0,1,2", "line 2: no targets"),
        ("", "line 2: no targets"),
        ("0,1,2,,", "line 2: '' is no whole number"),
        ("0,1,2,,3,,4", "line 2: '' is no whole number"),
        ("0,1,,3", "line 2: 2 items, but 3 in the lines before it"),
        ("0,1,x,,3", "line 2: 'x' is no whole number"),
        ("0,1,-2,,3", "line 2: '-2' is no whole number"),
        ("0,1,1_0,,3", "line 2: '1_0' is no whole number"),
        ("0,1, 2,,3", "line 2: ' 2' is no whole number"),
        ("0,1,2,,2147483648", "line 2: '2147483648' is no whole number"),
        ("0,1,0,,3", r"line 2: a pad \(0\) behind an item"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, bad: str, problem: str):
    path = tmp_path / "task.csv"
    path.write_text(f"0,1,2,,3\n{bad}\n1,2,3,,4\n")
    with pytest.raises(ValueError, match=f"{path.name}, {problem}"):
        read_ttl(path)


def test_files_of_the_wrong_kind(tmp_path: Path):
    path, other = tmp_path / "task.csv", tmp_path / "other.csv"
    path.write_text("0,1,2,,3\n")
    with pytest.raises(ValueError, match="line 1: targets in the file of a first task"):
        read_ttl(path, has_targets=False)
    other.write_text("")
    with pytest.raises(ValueError, match=r"other\.csv is empty"):
        read_ttl(other)
    other.write_text("1,2\n")
    with pytest.raises(ValueError, match=r"task\.csv has 3 items a line, .*other\.csv has 2"):
        ttl_tasks(other, [TtlTask("T2", "item", path)])


def random_users(seed: int, count: int, max_target: int) -> list[User]:
    rng = np.random.default_rng(seed)
    return [
        (rng.integers(1, 30, rng.integers(0, LENGTH + 1)).tolist(), rng.integers(0, max_target, 1 + n % 3).tolist())
        for n in range(count)
    ]


def read_back(tasks: TaskSet) -> list[list[tuple[tuple[str, ...], str]]]:
    """Of every task its samples in order: items as in the file, target as in the file."""
    names = tasks.sequences.item_ids
    histories = [tuple(names[item] for item in row if item) for row in tasks.sequences.items.tolist()]
    return [
        [(histories[row], task.classes[label]) for row, label in zip(task.rows, task.labels, strict=True)]
        for task in tasks.tasks
    ]


def test_tasks_hold_every_line_and_target(tmp_path: Path):
    first, clicks = random_users(0, 60, 1), random_users(1, 30, 500)
    clicks += [(items, [7, 3]) for items, _ in first[:20]]  # users of the first file
    ages = [(items, [number % 4 * 10]) for number, (items, _) in enumerate(first)]
    paths = [tmp_path / f"task{n}.csv" for n in (1, 2, 3)]
    for path, users in zip(paths, (first, clicks, ages), strict=True):
        path.write_text("\n".join(line(user, has_targets=path != paths[0]) for user in users))
    later = [TtlTask("clicks", "item", paths[1]), TtlTask("age", "label", paths[2])]
    tasks = ttl_tasks(paths[0], later, TaskSplit(validation=0.2, test=0.3))

    def expected(users: list[User]) -> list[tuple[tuple[str, ...], str]]:
        usable = [(tuple(map(str, items)), targets) for items, targets in users if len(items) >= 2]
        return [(items, str(target)) for items, targets in usable for target in targets]

    found = read_back(tasks)
    everyone = list(dict.fromkeys(tuple(items) for items, _ in first + clicks + ages if len(items) >= 2))
    assert found[0] == [(tuple(map(str, items)), str(items[-1])) for items in everyone]
    assert found[1:] == [expected(clicks), expected(ages)]
    assert [task.metric for task in tasks.tasks] == ["mrr_at_5", "mrr_at_5", "accuracy"]
    # Numbers keep the order of the ids, as in the official code.
    assert list(map(int, tasks.sequences.item_ids[1:])) == sorted({i for items in everyone for i in items})
    assert list(map(int, tasks.tasks[1].classes)) == sorted({int(target) for _, target in expected(clicks)})
    for name, users in (("T1", first), ("clicks", clicks), ("age", ages)):
        assert tasks.facts[f"{name}_lines"] == len(users)
        assert tasks.facts[f"{name}_lines_without_history"] == sum(len(items) < 2 for items, _ in users)
    assert tasks.facts["users"] == len(everyone)
    assert tasks.facts["clicks_samples"] == len(found[1])
    # One user, one split, whichever file names it.
    of_user = {}
    for task in tasks.tasks:
        for row, split in zip(task.rows.tolist(), task.split.tolist(), strict=True):
            assert of_user.setdefault(row, split) == split


def test_an_item_is_no_pad_where_nothing_is_padded(tmp_path: Path):
    path = tmp_path / "task.csv"
    path.write_text("\n".join(f"{n + 5},{n + 6},{n + 7}" for n in range(20)))
    sequences = ttl_tasks(path, []).sequences
    assert sequences.items.tolist() == [[n + 1, n + 2, n + 3] for n in range(20)]
    assert sequences.item_ids == ("", *map(str, range(5, 27)))


def test_users_keep_their_id_when_files_are_added(tmp_path: Path):
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    users = random_users(2, 40, 5)
    one.write_text("\n".join(line(user, has_targets=False) for user in users[:30]))
    two.write_text("\n".join(map(line, users)))
    alone = ttl_tasks(one, [])
    both = ttl_tasks(one, [TtlTask("T2", "label", two)])
    ids = alone.sequences.user_ids.to_pylist()
    assert both.sequences.user_ids.to_pylist()[: len(ids)] == ids
    assert len(set(both.sequences.user_ids.to_pylist())) == len(both.sequences.items) > len(ids)
