"""Tasks about the users of ingested shards: their profile labels, and what they chose in a service.

The split is that of the shards, so no task is measured on users that pretraining has seen.
"""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from userrep import storage
from userrep.config import Config, ConfigError
from userrep.data.assemble import NO_TIME, items_file, users_file
from userrep.data.task_builder import EventLog, TaskBuilder, places_from_end
from userrep.data.tasks import TaskSet
from userrep.manifest import read_manifest

FIRST_TASK = "universal"
COLUMNS = ["user_id", "split", "labels", *(f"histories.list.element.{name}" for name in ("service", "items", "times"))]


class LabelQuestion(Config):
    """A profile label of the user."""

    kind: Literal["label"] = "label"
    name: str = ""  # of the task; default: the label
    label: str


class ItemQuestion(Config):
    """An item that the user chose in a service. The events that are asked for are in no history.

    What the user did elsewhere afterwards is: it says what goes together, and is no forecast.
    """

    kind: Literal["item"] = "item"
    name: str = ""  # of the task; default: the service
    service: str
    max_targets: int = Field(default=3, ge=1)  # most recent events of the service


Question = Annotated[LabelQuestion | ItemQuestion, Field(discriminator="kind")]


def name_of(question: LabelQuestion | ItemQuestion) -> str:
    """Name of a question's task."""
    return question.name or (question.label if isinstance(question, LabelQuestion) else question.service)


def shard_tasks(
    directory: Path, questions: Sequence[LabelQuestion | ItemQuestion], max_items: int, max_users: int
) -> TaskSet:
    """The task `universal` over all users, and one for each question.

    A sequence is the most recent events of a user in all services, without those that a question asks for. `universal`
    is of kind `next_item`.

    Args:
        directory: ingested shards, a committed table.
        questions: in the order in which their tasks are learned.
        max_items: of a sequence, >= 2.
        max_users: so many users are read, >= 1, shard by shard; all of them are in memory.

    Raises:
        ConfigError: a service or a label that there is not, or no user with two events that are in no question.
        IncompleteTableError: the directory holds no committed table.
    """
    manifest = read_manifest(storage.fetch(directory))
    services: list[str] = manifest.facts["services"]
    log, split = _read(directory, len(manifest.facts["shards"]), max_users)
    targets: dict[str, np.ndarray] = {}
    for question in questions:
        if isinstance(question, LabelQuestion):
            continue
        if question.service not in services:
            raise ConfigError(f"task {name_of(question)}: no service {question.service!r}; there are {services}")
        places = np.flatnonzero(log.services == services.index(question.service))
        is_target = np.zeros(len(log.users), dtype=bool)
        is_target[places[places_from_end(log.users[places]) < question.max_targets]] = True
        targets[name_of(question)] = is_target
    is_history = ~np.any([np.zeros(len(log.users), dtype=bool), *targets.values()], axis=0)
    builder = TaskBuilder(log, is_history, split, max_items)
    tasks = [builder.next_item(FIRST_TASK)]
    for question in questions:
        name = name_of(question)
        is_label = isinstance(question, LabelQuestion)
        tasks.append(builder.profile(name, question.label) if is_label else builder.items(name, targets[name], None))
    return builder.task_set(tasks)


def _read(directory: Path, num_shards: int, max_users: int) -> tuple[EventLog, np.ndarray]:
    """The events of the first users, and the split of each user."""
    users, items = list[pa.Table](), list[pa.Table]()
    num_users = 0
    for shard in range(num_shards):
        user_file, item_file = (pq.ParquetFile(directory / name(shard)) for name in (users_file, items_file))
        for group in range(user_file.num_row_groups):
            if num_users < max_users:
                users.append(user_file.read_row_group(group, COLUMNS).slice(0, max_users - num_users))
                items.append(item_file.read_row_group(group, ["item_id", "text"]))
                num_users += users[-1].num_rows
    if not num_users:
        raise ConfigError(f"{directory} holds no user: ingest more data")
    bases = np.cumsum([0, *(table.num_rows for table in items)])
    entries = pa.concat_tables(items).combine_chunks()
    encoded = entries["item_id"].combine_chunks().dictionary_encode()
    number_of_entry = encoded.indices.to_numpy()
    first_entry = np.empty(len(encoded.dictionary), dtype=np.int64)
    first_entry[number_of_entry[::-1]] = np.arange(len(number_of_entry))[::-1]  # of equal ones the last holds
    parts = [_events(table, number_of_entry[base:]) for table, base in zip(users, bases, strict=False)]
    first_users = np.cumsum([0, *(table.num_rows for table in users)])
    events = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    events["user"] += np.repeat(first_users[:-1], [len(part["user"]) for part in parts])
    order = np.lexsort([events[name] for name in ("place", "service", "time", "user")])
    table = pa.concat_tables(users).combine_chunks()
    user_ids = table["user_id"].combine_chunks()
    log = EventLog(
        user_ids=user_ids,
        item_ids=encoded.dictionary,
        item_texts=entries["text"].take(pa.array(first_entry)).combine_chunks(),
        users=events["user"][order],
        items=events["item"][order],
        services=events["service"][order],
        values=np.full(len(order), np.nan),
        labels=dict(zip(user_ids.to_pylist(), map(dict, table["labels"].to_pylist()), strict=True)),
        facts={"users": len(user_ids), "events": len(order)},
    )
    return log, table["split"].to_numpy()


def _events(users: pa.Table, number_of_entry: np.ndarray) -> dict[str, np.ndarray]:
    """User, item, service, time (NO_TIME where unknown) and place in its history of every event of a row group."""
    histories = users["histories"].combine_chunks()
    references, times = (pc.struct_field(histories.flatten(), name) for name in ("items", "times"))
    counts = references.value_lengths().to_numpy()
    starts = np.cumsum(counts) - counts
    history_users = np.repeat(np.arange(users.num_rows), histories.value_lengths().to_numpy())
    services = pc.struct_field(histories.flatten(), "service").to_numpy()
    return {
        "user": np.repeat(history_users, counts),
        "item": number_of_entry[references.flatten().to_numpy()].astype(np.int64),
        "service": np.repeat(services, counts),
        "time": times.flatten().fill_null(NO_TIME).to_numpy(),
        "place": np.arange(counts.sum()) - np.repeat(starts, counts),
    }
