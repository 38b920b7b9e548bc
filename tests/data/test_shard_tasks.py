"""Tasks of ingested shards against a loop over users."""

from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ingested import SERVICES, draw_shards
from tests.support.memory_source import MemorySource, assemble, event, item
from tests.support.naive import read_shards
from tests.support.tokenized import User, item_text, write_ingested
from userrep.config import ConfigError
from userrep.data.shard_tasks import ItemQuestion, LabelQuestion, name_of, shard_tasks
from userrep.data.split import SPLITS
from userrep.data.tasks import Task, TaskSet
from userrep.manifest import IncompleteTableError, Manifest, write_manifest

GENDER, AGE = LabelQuestion(label="gender"), LabelQuestion(label="age", name="how old")
Questions = tuple[LabelQuestion | ItemQuestion, ...]
QUESTIONS: list[Questions] = [
    (GENDER, AGE),
    (ItemQuestion(service="buy", max_targets=1), GENDER),
    (AGE, ItemQuestion(service="rate"), ItemQuestion(service="view", name="seen", max_targets=2)),
    # A service that is asked for twice: what either asks for is in no history.
    (ItemQuestion(service="buy", name="last", max_targets=1), ItemQuestion(service="buy", name="all", max_targets=99)),
]


class Asked(NamedTuple):
    """What is to be known of a user."""

    history: list[str]
    targets: dict[str, list[str]]  # by question


def ask(user: User, questions: Questions, max_items: int) -> Asked:
    """One user at a time: all events in order, then what questions take from them."""
    events = sorted(
        (time is not None, time or 0, service, place, name)
        for service, history in user.histories.items()
        for place, (name, time) in enumerate(history)
    )
    targets = {}
    for question in questions:
        if isinstance(question, ItemQuestion):
            own = [seen for seen in events if SERVICES[seen[2]] == question.service]
            targets[name_of(question)] = own[-question.max_targets :]
    rest = [seen for seen in events if not any(seen in own for own in targets.values())]
    return Asked([seen[-1] for seen in rest], {name: [seen[-1] for seen in own] for name, own in targets.items()})


def samples(tasks: TaskSet, task: Task) -> list[tuple[str, str, int]]:
    users = tasks.sequences.user_ids.to_pylist()
    return [
        (users[row], task.classes[label], split)
        for row, label, split in zip(task.rows, task.labels, task.split, strict=True)
    ]


def check(tasks: TaskSet, users: list[User], questions: Questions, max_items: int) -> None:
    """Compares everything that there is to know of the tasks."""
    sequences, found = tasks.sequences, {user.user_id: ask(user, questions, max_items) for user in users}
    known = [user for user in users if len(found[user.user_id].history) >= 2]
    split_of = {user.user_id: SPLITS.index(user.split) for user in users}
    rows = [[sequences.item_ids[number] for number in row if number] for row in sequences.items.tolist()]
    assert sequences.user_ids.to_pylist() == [user.user_id for user in known]
    assert rows == [found[user.user_id].history[-max_items:] for user in known]
    assert sequences.items.shape == (len(known), max_items)
    # Every item has one number and its own text, whatever its reference in a row group is, and none is there in vain.
    assert sorted(sequences.item_ids[1:]) == sorted({name for row in rows for name in row})
    assert sequences.texts == ("", *map(item_text, sequences.item_ids[1:]))

    first, *later = tasks.tasks
    assert (first.name, first.kind, first.classes) == ("universal", "next_item", sequences.item_ids)
    assert samples(tasks, first) == [
        (user.user_id, row[-1], split_of[user.user_id]) for user, row in zip(known, rows, strict=True)
    ]
    assert [task.name for task in later] == [name_of(question) for question in questions]
    for task, question in zip(later, questions, strict=True):
        if isinstance(question, LabelQuestion):
            expected = [(user, value) for user in known for name, value in user.labels if name == question.label]
        else:
            wanted = {user.user_id: found[user.user_id].targets[task.name] for user in known}
            expected = [(user, name) for user in known for name in dict.fromkeys(wanted[user.user_id])]
            repeated = sum(map(len, wanted.values())) - len(expected)
            assert tasks.facts[f"{task.name}_repeated_targets"] == repeated
        assert task.kind == question.kind
        assert Counter(samples(tasks, task)) == Counter((u.user_id, name, split_of[u.user_id]) for u, name in expected)
        assert sorted(task.classes) == sorted({name for _, name in expected})
        assert tasks.facts[f"{task.name}_samples"] == len(expected)
        assert tasks.facts[f"{task.name}_users_without_sample"] == len(known) - len({u.user_id for u, _ in expected})
    lengths = [len(asked.history) for asked in found.values()]
    counts = {"users_without_history": lengths.count(0), "users_with_one_item": lengths.count(1), "users": len(users)}
    counts |= {"sequences": len(known), "events": sum(len(e) for user in users for e in user.histories.values())}
    assert {name: tasks.facts[name] for name in counts} == counts


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.sampled_from(QUESTIONS), st.integers(12, 45))
def test_tasks_are_those_of_a_loop_over_users(seed: int, max_items: int, questions: Questions, max_users: int) -> None:
    shards = draw_shards(seed)
    with TemporaryDirectory() as directory:
        write_ingested(Path(directory), SERVICES, shards)
        tasks = shard_tasks(Path(directory), questions, max_items, max_users)
    users = [user for groups in shards for group in groups for user in group]
    check(tasks, users[:max_users], questions, max_items)


def test_null_times_come_first_then_the_service_then_the_place(tmp_path: Path) -> None:
    histories = {0: [("a", None), ("b", -5), ("c", 7)], 1: [("d", None), ("e", 7), ("f", 7)], 2: [("g", 6)]}
    users = [User(f"u{n}", SPLITS[n], histories, (("gender", "F"),)) for n in range(3)]
    write_ingested(tmp_path, SERVICES, [[users]])

    def read(*questions: LabelQuestion | ItemQuestion, max_items: int = 9) -> list[str]:
        sequences = shard_tasks(tmp_path, questions, max_items, 10).sequences
        return ["".join(sequences.item_ids[number] for number in row) for row in sequences.items.tolist()]

    assert read(GENDER) == ["adbgcef"] * 3
    assert read(GENDER, max_items=3) == ["cef"] * 3
    assert read(ItemQuestion(service="buy", max_targets=1)) == ["adbgce"] * 3
    assert read(ItemQuestion(service="buy"), ItemQuestion(service="view", max_targets=2), max_items=4) == ["ag"] * 3


def test_tasks_of_shards_that_were_really_ingested(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    items = [item(f"i{n}", item_text(f"i{n}")) for n in range(10)]
    events = [
        event(f"user {rng.integers(0, 150)}", f"i{rng.integers(0, 10)}", line, service=SERVICES[rng.integers(0, 3)])
        for line in range(1500)
    ]
    for record in events:
        record["time"] = None if rng.random() < 0.2 else int(rng.integers(0, 50))
    profiles = [
        {"user_id": f"user {n}", "labels": [("gender", "FM"[n % 2])], "file": "users", "line": n} for n in range(130)
    ]
    source = MemorySource(tuple(SERVICES), [[items]], [[events]], [[profiles]])
    _, facts = assemble(source, tmp_path, num_shards=3, row_group_size=7)
    known = {"services": SERVICES, "shards": facts}
    write_manifest(tmp_path, Manifest(table="shards_text", stage="ingest", config={}, facts=known))
    users = [
        User(
            user_id,
            SPLITS[found.split],
            {SERVICES.index(name): [seen[:2] for seen in history] for name, history in found.histories.items()},
            tuple(found.labels.items()),
        )
        for user_id, found in read_shards(tmp_path, facts, SERVICES).items()
    ]
    questions = (GENDER, ItemQuestion(service="rate"))
    check(shard_tasks(tmp_path, questions, 6, 1000), users, questions, 6)


def test_what_there_is_not_is_an_error(tmp_path: Path) -> None:
    write_ingested(tmp_path / "data", SERVICES, draw_shards(0))
    with pytest.raises(ConfigError, match=r"task sold: no service 'sell'; there are \['view', 'buy', 'rate'\]"):
        shard_tasks(tmp_path / "data", [ItemQuestion(service="sell", name="sold")], 5, 100)
    with pytest.raises(ConfigError, match=r"no user has the label 'job': .* \['age', 'gender'\]"):
        shard_tasks(tmp_path / "data", [LabelQuestion(label="job")], 5, 100)
    with pytest.raises(ConfigError, match="max_items is 1"):
        shard_tasks(tmp_path / "data", [GENDER], 1, 100)
    with pytest.raises(IncompleteTableError, match=r"holds no manifest\.json"):
        shard_tasks(tmp_path, [GENDER], 5, 100)
    write_ingested(tmp_path / "empty", SERVICES, [[], []])
    with pytest.raises(ConfigError, match="empty holds no user"):
        shard_tasks(tmp_path / "empty", [GENDER], 5, 100)
    short = [User(f"u{n}", split, {1: [("a", 1), ("b", 2)]}) for n, split in enumerate(SPLITS)]
    write_ingested(tmp_path / "short", SERVICES, [[short]])
    with pytest.raises(ConfigError, match="none of 3 users has 2 events"):
        shard_tasks(tmp_path / "short", [ItemQuestion(service="buy", max_targets=1)], 5, 100)
