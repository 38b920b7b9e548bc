"""What publishing and pulling must know of a kind of table: one recipe serves all kinds."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from userrep.manifest import Manifest


@dataclass(frozen=True)
class TableKind:
    """A kind of table that a registered model can hold; all its versions are of one kind.

    Attributes:
        name: value of the tag `userrep.table` of the registered model, and of `Manifest.table`.
        noun: for messages, e.g. `embedding table`.
        publisher: command that makes versions of this kind, for messages.
        model_type: of the MLflow LoggedModel.
        identity: the fact that two tables of equal content share; also a tag of the model and of the version.
        params: facts that are parameters of the model.
        tags: facts that are tags of the version, where the table has them.
        read: reads a manifest and checks that it is of this kind, without touching the other files. Raises
            IncompleteTableError.
        verify: reads it and checks the table completely. Raises IncompleteTableError.
        describe: one line about a table, from its facts.
        rows_are: what its rows stand for, where several kinds share a noun.
    """

    name: str
    noun: str
    publisher: str
    model_type: str
    identity: str
    params: tuple[str, ...]
    tags: tuple[str, ...]
    read: Callable[[Path], Manifest]
    verify: Callable[[Path], Manifest]
    describe: Callable[[Mapping[str, Any]], str]
    rows_are: str = ""

    @property
    def plural(self) -> str:
        """The noun of several, for messages: `embedding tables of users`."""
        return f"{self.noun}s of {self.rows_are}" if self.rows_are else f"{self.noun}s"

    def params_of(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """Parameters of the model."""
        return {key: _text(facts[key]) for key in self.params}

    def tags_of(self, facts: Mapping[str, Any]) -> dict[str, str]:
        """Tags of the version; what a table does not have, it has no tag of."""
        return {key: _text(facts[key]) for key in self.tags if facts.get(key) not in (None, [])}


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
