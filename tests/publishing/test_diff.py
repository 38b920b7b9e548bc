"""What differs between two tables, counted by hand and by the code."""

import numpy as np
import pyarrow as pa
import pytest

from tests.publishing.matrices import unit_matrix, write_matrix
from userrep.publishing.diff import QUANTILES, diff_tables

IDS = [f"user-{number:03d}" for number in range(60)]


@pytest.mark.parametrize("buckets", [3, 4])
def test_added_removed_and_changed_ids_are_found(tmp_path, buckets):
    vectors, other = unit_matrix(60, 8, seed=0), unit_matrix(60, 8, seed=1)
    new = np.where(np.arange(60)[:, None] % 10 == 0, other, vectors)
    write_matrix(tmp_path / "old", vectors[:50], IDS[:50])
    write_matrix(tmp_path / "new", new[20:], IDS[20:], buckets=buckets)
    told: dict[str, list[str]] = {"added": [], "removed": [], "changed": []}

    def on_ids(change: str, ids: pa.Array) -> None:
        told[change] += ids.to_pylist()

    found = diff_tables(tmp_path / "old", tmp_path / "new", on_ids)
    assert {change: sorted(ids) for change, ids in told.items()} == {
        "added": IDS[50:],
        "removed": IDS[:20],
        "changed": [IDS[20], IDS[30], IDS[40]],
    }
    assert (found.added, found.removed, found.changed, found.unchanged) == (10, 20, 3, 27)
    cosines = (vectors[20:50] * new[20:50]).sum(axis=1)
    assert found.mean_cosine == pytest.approx(cosines.mean(), abs=1e-6)
    assert found.cosine_quantiles == pytest.approx(np.quantile(cosines, QUANTILES), abs=1e-5)


def test_other_widths_are_said_and_not_compared(tmp_path):
    write_matrix(tmp_path / "old", unit_matrix(20, 8, seed=0))
    write_matrix(tmp_path / "new", unit_matrix(20, 4, seed=0), dtype="int8")
    found = diff_tables(tmp_path / "old", tmp_path / "new")
    assert (found.dims, found.dtypes, found.changed, found.mean_cosine) == ((8, 4), ("float32", "int8"), 20, None)


def test_disjoint_tables_have_no_cosine(tmp_path):
    write_matrix(tmp_path / "old", unit_matrix(5, 8, seed=0), IDS[:5])
    write_matrix(tmp_path / "new", unit_matrix(5, 8, seed=0), IDS[5:10])
    found = diff_tables(tmp_path / "old", tmp_path / "new")
    assert (found.added, found.removed, found.mean_cosine, found.cosine_quantiles) == (5, 5, None, None)
