"""The contract between a source of raw data and ingest."""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import pyarrow as pa

TableName = Literal["items", "events", "users"]


class Parsed(NamedTuple):
    """One batch of records: the good ones in the table's schema, the others with their reason."""

    rows: pa.Table  # schema.ITEMS | schema.EVENTS | schema.USERS
    rejected: pa.Table  # schema.REJECTED


# A part of a table that one task reads on its own: picklable, deterministic, bounded in memory.
Part = Callable[[], Iterator[Parsed]]


class Source(Protocol):
    """Raw data of one data set. Implementations are frozen configs, so a source is also its own description."""

    def services(self) -> list[str]:
        """Names of the behaviour sources in a fixed order; an event of any other service is rejected."""
        ...

    def parts(self, table: TableName) -> list[Part]:
        """Independent parts that together hold every record of `table` once; none when the data set lacks the table."""
        ...
