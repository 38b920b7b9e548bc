"""A source whose records stand in memory, and ingest without Ray."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from userrep.data import ingest
from userrep.data.sources.source import Parsed, Part, TableName
from userrep.schema import EVENTS, ITEMS, REJECTED, USERS

SCHEMAS = {"items": ITEMS, "events": EVENTS, "users": USERS}


class MemorySource(NamedTuple):
    """Every inner list is a batch, every list of batches a part."""

    service_names: tuple[str, ...]
    items: list[list[list[dict[str, Any]]]]
    events: list[list[list[dict[str, Any]]]]
    users: list[list[list[dict[str, Any]]]]

    def services(self) -> list[str]:
        return list(self.service_names)

    def parts(self, table: TableName) -> list[Part]:
        return [partial(read_batches, table, batches) for batches in getattr(self, table)]


def read_batches(
    table: TableName, batches: list[list[dict[str, Any]]], crash_after: int | None = None
) -> Iterator[Parsed]:
    """The batches; a record with a `reason` is a rejected one. Raises before batch number `crash_after`."""
    for number, batch in enumerate(batches):
        if number == crash_after:
            raise OSError("disk on fire")
        yield Parsed(
            pa.Table.from_pylist([record for record in batch if "reason" not in record], schema=SCHEMAS[table]),
            pa.Table.from_pylist([record for record in batch if "reason" in record], schema=REJECTED),
        )


def run_serially(
    run: Callable[[int], dict[str, Any]], num_tasks: int, progress: ingest.Progress
) -> list[dict[str, Any]]:
    """Stands in for `ingest.run_tasks` where what the tasks write is tested, and not that Ray runs them."""
    results = []
    for task in range(num_tasks):
        results.append(run(task))
        progress(task + 1, num_tasks, sum(result["rows"] for result in results))
    return results


def ignore_progress(done: int, total: int, rows: int) -> None:
    """Shows nothing."""


def item(item_id: str, text: str | None = None, line: int = 1) -> dict[str, Any]:
    return {"item_id": item_id, "text": f"text of {item_id}" if text is None else text, "file": "items", "line": line}


def event(user_id: str, item_id: str, line: int, **values: Any) -> dict[str, Any]:
    """An event of service `a` at a time equal to its line, unless `values` say otherwise."""
    record = {"user_id": user_id, "item_id": item_id, "service": "a", "time": line, "position": None, "value": None}
    return {**record, "file": "events", "line": line, **values}


def assemble(
    source: MemorySource, directory: Path, num_shards: int, row_group_size: int
) -> tuple[dict[str, dict[str, int]], list[dict[str, Any]]]:
    """Both passes of ingest in this process. Returns the counts and the shards' facts."""
    directory.mkdir(parents=True, exist_ok=True)
    config = ingest.IngestConfig(num_shards=num_shards, row_group_size=row_group_size)
    original, ingest.run_tasks = ingest.run_tasks, run_serially
    try:
        counts = ingest.parse_source(source, num_shards, directory, ignore_progress)
        return counts, ingest.assemble_shards(source.services(), config, directory, ignore_progress)
    finally:
        ingest.run_tasks = original
