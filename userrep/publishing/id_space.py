"""What the ids of a table are ids of: two tables may be joined if they name the same id space.

Needs pyarrow only (no numpy, no torch).
"""

from typing import Any

from userrep.config import digest_json
from userrep.manifest import Manifest
from userrep.publishing.entity import Entity

ID_SPACE_FACT = "id_space"
DIGEST_FACT = "id_space_digest"


class IdSpaceMismatchError(ValueError):
    """Equal ids of the two tables do not mean the same user or item."""


def id_space_digest(entity: Entity, name: str) -> str:
    """Identity of an id space: of the kind of what has the ids, and of the name under which they are given out."""
    return digest_json({"entity": entity.name, "id_space": name})


def id_space_facts(entity: Entity, name: str | None) -> dict[str, Any]:
    """What a manifest says of a table's ids; nothing where they have no name."""
    return {ID_SPACE_FACT: name, DIGEST_FACT: id_space_digest(entity, name)} if name else {}


def check_same_ids(left: Manifest, right: Manifest) -> None:
    """Refuses two tables whose ids are of different kinds; a table that names no id space is taken at its word.

    Raises:
        IdSpaceMismatchError: names both.
    """
    if left.table != right.table:
        raise IdSpaceMismatchError(f"one table is of {left.table!r}, the other of {right.table!r}: their ids differ")
    stated = [manifest.facts.get(DIGEST_FACT) for manifest in (left, right)]
    if None not in stated and stated[0] != stated[1]:
        names = [manifest.facts.get(ID_SPACE_FACT) for manifest in (left, right)]
        raise IdSpaceMismatchError(
            f"ids of one table are of id space {names[0]!r}, those of the other of {names[1]!r}: equal ids there are "
            "different users; compare tables of one id space (config key embed.id_space)"
        )
