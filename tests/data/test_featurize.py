"""Ray Data's passes over an item table against the same in one process."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.test_mutual_information import CONFIGS, draw_items, vocabularies_of
from userrep import schema
from userrep.data.features import ItemFeatures
from userrep.data.featurize import featurize, item_blocks
from userrep.data.item_text import format_attributes
from userrep.data.mutual_information import MutualInformation


def write_items(directory: Path) -> None:
    """Two parts, one of several row groups."""
    ids, attributes = draw_items()
    texts = [format_attributes(given) for given in attributes]
    table = pa.table([ids, texts, ["x"] * len(ids), range(len(ids))], names=schema.ITEMS.names).cast(schema.ITEMS)
    (directory / "items").mkdir()
    pq.write_table(table.slice(0, 20), directory / "items/part-00000.parquet")
    pq.write_table(table.slice(20), directory / "items/part-00001.parquet", row_group_size=15)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_passes_give_what_one_process_computes(tmp_path: Path) -> None:
    write_items(tmp_path)
    ids, attributes = draw_items()
    expected = vocabularies_of(ids, attributes)
    items = ItemFeatures.of(ids, attributes, expected)
    information = MutualInformation(expected)
    information.add(items)

    assert len(item_blocks(tmp_path)) == 4
    found, found_information = featurize(tmp_path, CONFIGS)
    assert found.vocabularies == expected
    assert found.to_table() == items.to_table()
    assert np.array_equal(found_information, information.result())


def test_no_items_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no items in"):
        item_blocks(tmp_path)
