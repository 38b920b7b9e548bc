"""What the rows of an embedding table stand for: users or items. All that differs between the two is here.

Needs pyarrow only (no numpy, no torch).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow as pa

from userrep.schema import item_embeddings, user_embeddings


@dataclass(frozen=True)
class Entity:
    """What one row of an embedding table stands for.

    Attributes:
        name: singular, for messages and the card; the plural has an `s`.
        schema: columns of a table, from the width of its vectors, their type and the tasks that have a column. The
            first one is the id.
        absent: those of them that have no vector, for messages.
        made_by: what computes a vector, for the card.
        limits: what every user of a table must know; lines of the card.
    """

    name: str
    schema: Callable[..., pa.Schema]
    absent: str
    made_by: str
    limits: tuple[str, ...]

    @property
    def id_column(self) -> str:
        """Name of the column with the ids."""
        return f"{self.name}_id"

    @property
    def table(self) -> str:
        """Kind of the table: `Manifest.table`, and the tag `userrep.table` of a registered model."""
        return f"{self.name}_embeddings"


SAME_ENCODER = "Vectors of two tables are comparable only if both name the same encoder digest."

USER = Entity(
    name="user",
    schema=user_embeddings,
    absent="users without events",
    made_by="computed from the user's events by a contrastively pretrained encoder",
    limits=(
        SAME_ENCODER,
        "A user without events has no row. A vector describes the events up to `last_time` and does not age by itself.",
        "The table is personal data: whoever can read it can compare users.",
    ),
)
ITEM = Entity(
    name="item",
    schema=item_embeddings,
    absent="items without content",
    made_by="computed from the item's attributes by the item encoder of a contrastively trained model",
    limits=(
        SAME_ENCODER,
        "An item that the catalogue did not have when the table was made has no row, and a later change of an item's "
        "attributes is not in its vector.",
    ),
)

ENTITIES: Mapping[str, Entity] = MappingProxyType({entity.table: entity for entity in (USER, ITEM)})


def entity_of(schema: pa.Schema) -> Entity:
    """The entity whose id column a table has.

    Raises:
        ValueError: the table has no such column.
    """
    for entity in ENTITIES.values():
        if entity.id_column in schema.names:
            return entity
    wanted = " or ".join(repr(entity.id_column) for entity in ENTITIES.values())
    raise ValueError(f"received columns {', '.join(schema.names)}; an embedding table has a column {wanted}")
