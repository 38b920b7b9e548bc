"""What a table is of is read from its columns."""

import pyarrow as pa
import pytest

from userrep.publishing.entity import ENTITIES, entity_of


@pytest.mark.parametrize("entity", ENTITIES.values(), ids=lambda entity: entity.name)
def test_an_entity_is_known_by_its_id_column(entity):
    schema = entity.schema(4, "float16", ())
    assert entity_of(schema) is entity
    assert schema.names[0] == entity.id_column
    with pytest.raises(ValueError, match=r"dtype 'int4' and dim 4: use float32, float16 or int8"):
        entity.schema(4, "int4", ())


def test_another_table_is_refused_with_the_columns_that_it_has():
    with pytest.raises(ValueError, match=r"received columns id, vector; .* a column 'user_id' or 'item_id'"):
        entity_of(pa.schema([("id", pa.string()), ("vector", pa.float32())]))
