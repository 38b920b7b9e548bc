"""Base of every config: frozen pydantic models, strict keys, dotted overrides, stable content hash."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

HASH_CHARS = 12  # 48 bits: a workspace with a million configs has a collision chance of 2e-3


class ConfigError(ValueError):
    """A config that cannot be used. The message names the key, what was received and what is allowed."""


class Config(BaseModel):
    """Immutable config node. Unknown keys are errors; defaults are complete runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def content_hash(self) -> str:
        """Hex digest (12 characters) of the resolved values, independent of key order and of the process."""
        return digest_json(self.model_dump(mode="json"))

    def with_overrides(self, assignments: Sequence[str]) -> Self:
        """Returns a copy with `a.b=value` assignments applied; values are parsed as YAML scalars or lists.

        Raises:
            ConfigError: malformed assignment, unknown key, or a value of the wrong type or range.
        """
        values = self.model_dump(mode="json")
        for assignment in assignments:
            path, separator, text = assignment.partition("=")
            if not separator or not path:
                raise ConfigError(f"override {assignment!r} is not of the form key.subkey=value")
            _assign(values, path.split("."), yaml.safe_load(text), path)
        return type(self).parse(values)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Validates plain values; turns pydantic's report into one ConfigError with a line per problem."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [_line(problem, values) for problem in error.errors()]
            raise ConfigError("\n".join([f"invalid {cls.__name__}:", *lines])) from error


def _line(problem: Any, values: dict[str, Any]) -> str:
    place, received = ".".join(map(str, _keys(problem["loc"], values))), problem.get("input")
    # A problem between keys is reported with all of them, which says nothing.
    tail = "" if isinstance(received, dict | BaseModel) else f" (received {received!r})"
    return f"  {place}{': ' if place else ''}{problem['msg']}{tail}"


def _keys(place: Sequence[Any], node: Any) -> list[Any]:
    """The keys of a place in plain values: pydantic also names the choice that it made of several kinds of node."""
    keys = []
    for number, part in enumerate(place):
        is_choice = isinstance(node, dict) and part not in node and number < len(place) - 1
        if not is_choice:
            keys.append(part)
            node = node.get(part) if isinstance(node, dict) else None
    return keys


def digest_json(value: Any) -> str:
    """Short stable digest of a JSON-plain value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]


def _assign(values: dict[str, Any], path: list[str], value: Any, whole: str) -> None:
    node = values
    for depth, key in enumerate(path):
        if not isinstance(node, dict) or key not in node:
            known = ", ".join(sorted(node)) if isinstance(node, dict) else "none (it is a plain value)"
            raise ConfigError(f"unknown config key {whole!r}: {key!r} not found; keys here: {known}")
        if depth == len(path) - 1:
            node[key] = value
        else:
            node = node[key]
