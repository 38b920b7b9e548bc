"""A seeded mutator of JSON, bytes and directories."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

VALUES = (
    None,
    True,
    -1,
    0,
    2**63,
    10**400,
    1e308,
    float("nan"),
    "",
    "../x",
    "/etc/passwd",
    "part-00000.parquet",
    "a\0b",
    "x" * 5000,
    "\ud800",
    [],
    {},
    [[]],
    {"a": {"b": None}},
)
# Texts that are JSON, or nearly so, and break readers of it.
TEXTS = (b"", b"null", b"[]", b"7", b'"text"', b"[" * 100_000, b"9" * 5000, b"\xff\xfe", b'{"a": 1, "a": 2}', b"NaN")


def mutated_value(source: random.Random, value: Any) -> Any:
    """A copy of plain values with one place changed: taken away, added, repeated, swapped, or of another type."""
    value = json.loads(json.dumps(value))
    places = list(_places(value))
    if not places:
        return source.choice(VALUES)
    node, key = source.choice(places)
    change = source.choice(("replace", "remove", "add", "repeat", "character"))
    if change == "remove":
        del node[key]
    elif change == "add" and isinstance(node, dict):
        node["surplus"] = source.choice(VALUES)
    elif change == "repeat" and isinstance(node, list):
        node.insert(source.randrange(len(node) + 1), node[key])
    elif change == "character" and isinstance(node[key], str) and node[key]:
        node[key] = mutated_text(source, node[key])
    else:
        node[key] = source.choice(VALUES)
    return value


def mutated_text(source: random.Random, text: str) -> str:
    at = source.randrange(len(text))
    return text[:at] + source.choice(("", "0", "a", "/", "\n", "%2e", "?", "\u00e9")) + text[at + 1 :]


def mutated_bytes(source: random.Random, content: bytes) -> bytes:
    """A bit flipped, an end cut off or added, a stretch zeroed, or something else altogether."""
    at = source.randrange(max(1, len(content)))
    change = source.choice(("flip", "cut", "append", "zero", "other"))
    if change == "flip" and content:
        return content[:at] + bytes([content[at] ^ (1 << source.randrange(8))]) + content[at + 1 :]
    if change == "cut":
        return content[:at]
    if change == "append":
        return content + source.randbytes(1 + source.randrange(20))
    if change == "zero":
        return content[:at] + bytes(len(content[at : at + 64])) + content[at + 64 :]
    return source.choice(TEXTS)


def mutate_directory(source: random.Random, directory: Path, others: Path) -> None:
    """Changes one or two files: damaged, swapped, missing, of another table, or their manifest as JSON."""
    for _ in range(source.choice((1, 1, 2))):
        present = sorted(path for path in directory.iterdir() if path.is_file())
        if not present:
            return
        path = source.choice(present)
        source.choice(_CHANGES)(source, directory, path, others)


def _damage(source: random.Random, _: Path, path: Path, __: Path) -> None:
    path.write_bytes(mutated_bytes(source, path.read_bytes()))


def _swap(source: random.Random, directory: Path, path: Path, _: Path) -> None:
    other = source.choice(sorted(one for one in directory.iterdir() if one.is_file()))
    mine, its = path.read_bytes(), other.read_bytes()
    path.write_bytes(its)
    other.write_bytes(mine)


def _remove(_: random.Random, __: Path, path: Path, ___: Path) -> None:
    path.unlink()


def _make_a_folder(_: random.Random, __: Path, path: Path, ___: Path) -> None:
    path.unlink()
    path.mkdir()


def _take_from_another(_: random.Random, __: Path, path: Path, others: Path) -> None:
    path.write_bytes((others / path.name).read_bytes())


def _change_json(source: random.Random, directory: Path, _: Path, __: Path) -> None:
    path = directory / "manifest.json"
    try:
        value = mutated_value(source, json.loads(path.read_text()))
    except (ValueError, OSError, IndexError, RecursionError):  # it is no JSON any more
        return
    path.write_text(json.dumps(value))


_CHANGES: tuple[Callable[[random.Random, Path, Path, Path], None], ...] = (
    _damage,
    _swap,
    _remove,
    _make_a_folder,
    _take_from_another,
    _change_json,
    _change_json,
    _change_json,
)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of plain values."""
    found, open_nodes = [], [value] if isinstance(value, dict | list) else []
    while open_nodes:
        node = open_nodes.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            found.append((node, key))
            if isinstance(node[key], dict | list):
                open_nodes.append(node[key])
    return found
