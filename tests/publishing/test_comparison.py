"""Drift and rotation of two versions, against what was put in."""

import numpy as np
import pytest

from tests.publishing.matrices import normalised, rotated, rotation, unit_matrix, write_matrix
from userrep.publishing.alignment import AlignmentError, ProcrustesSums, read_maps, write_maps
from userrep.publishing.comparison import compare, neighbour_overlap


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_rotation_is_found_and_neighbours_stay(tmp_path, dtype):
    vectors = unit_matrix(600, 16, seed=0)
    write_matrix(tmp_path / "old", vectors)
    write_matrix(tmp_path / "new", rotated(vectors, seed=5), dtype=dtype)
    found = compare(tmp_path / "old", tmp_path / "new", sample=300)
    assert np.allclose(found.maps[0].matrix, rotation(16, 5).T, atol=2e-3)
    assert found.maps[0].mean_cosine > 0.9999
    assert abs(found.maps[0].unmapped_cosine) < 0.2
    assert found.maps[0].held_out == pytest.approx(60, abs=3)
    assert found.neighbour_overlap > 0.95
    assert (found.old_rows, found.new_rows, found.common, found.sample) == (600, 600, 600, 300)


def test_the_loss_is_that_of_ids_that_were_not_fitted_on():
    # Unrelated vectors, hardly more than dimensions: a rotation fits those it saw, and says nothing of the others.
    old, new = unit_matrix(80, 32, seed=0), unit_matrix(80, 32, seed=1)
    sums = ProcrustesSums("embedding", 32)
    sums.add(old, new)
    found = sums.solve()
    seen = np.arange(80) % 10 != 9
    cosines = ((new @ found.matrix) * old).sum(axis=1)
    assert cosines[seen].mean() > 0.3
    assert found.mean_cosine == pytest.approx(cosines[~seen].mean(), abs=1e-5)
    assert abs(found.mean_cosine) < 0.3


def test_the_map_does_not_depend_on_how_rows_come(tmp_path):
    old, new = unit_matrix(300, 8, seed=0), unit_matrix(300, 8, seed=1)
    whole, pieces = ProcrustesSums("embedding", 8), ProcrustesSums("embedding", 8)
    whole.add(old, new)
    for start in range(0, 300, 37):
        pieces.add(old[start : start + 37], new[start : start + 37])
    assert np.allclose(whole.solve().matrix, pieces.solve().matrix, atol=1e-5)
    assert whole.solve().mean_cosine == pytest.approx(pieces.solve().mean_cosine, abs=1e-5)


def test_too_few_common_ids_give_no_map(tmp_path):
    write_matrix(tmp_path / "old", unit_matrix(15, 8, seed=0))
    write_matrix(tmp_path / "new", unit_matrix(15, 8, seed=0))
    found = compare(tmp_path / "old", tmp_path / "new")
    assert (found.maps, found.neighbour_overlap) == ([], None)
    assert found.unmapped == "15 ids are in both tables, a map of 8 dimensions needs 16"


def test_other_widths_have_neighbours_and_no_map(tmp_path):
    vectors = unit_matrix(300, 8, seed=0)
    write_matrix(tmp_path / "old", vectors)
    write_matrix(tmp_path / "new", normalised(np.hstack([vectors, np.zeros((300, 4))])))
    found = compare(tmp_path / "old", tmp_path / "new")
    assert found.neighbour_overlap == 1
    assert "12 dimensions, those of the version before 8" in found.unmapped


def test_columns_of_tasks_have_maps_of_their_own(tmp_path):
    vectors, task = unit_matrix(300, 8, seed=0), unit_matrix(300, 8, seed=1)
    write_matrix(tmp_path / "old", vectors, tasks={"buys": task, "gone": task})
    write_matrix(tmp_path / "new", rotated(vectors, 3), tasks={"buys": rotated(task, 4), "new": task})
    maps = {one.column: one for one in compare(tmp_path / "old", tmp_path / "new").maps}
    assert set(maps) == {"embedding", "embedding_buys"}
    assert np.allclose(maps["embedding_buys"].matrix, rotation(8, 4).T, atol=1e-3)


def test_overlap_is_that_of_counting_one_by_one():
    old, new = unit_matrix(120, 8, seed=0), unit_matrix(120, 8, seed=1)
    shared = 0
    for row in range(120):
        nearest = [
            sorted((other for other in range(120) if other != row), key=lambda o, m=m: -float(m[row] @ m[o]))[:10]
            for m in (old, new)
        ]
        shared += len(set(nearest[0]) & set(nearest[1]))
    assert neighbour_overlap(old, new, 10) == pytest.approx(shared / 1200)


def test_maps_come_back_and_others_are_refused(tmp_path):
    sums = ProcrustesSums("embedding", 4)
    sums.add(unit_matrix(50, 4, 0), unit_matrix(50, 4, 1))
    written = sums.solve()
    write_maps(tmp_path / "maps.parquet", [written], {"to_version": 3})
    (read,) = read_maps(tmp_path / "maps.parquet")
    assert np.array_equal(read.matrix, written.matrix)
    assert (read.column, read.mean_cosine) == ("embedding", written.mean_cosine)
    write_maps(tmp_path / "skew.parquet", [type(written)("embedding", np.ones((4, 4)), 5, 0.5, 0.5)], {})
    with pytest.raises(AlignmentError, match="not orthogonal"):
        read_maps(tmp_path / "skew.parquet")
    (tmp_path / "junk.parquet").write_bytes(b"junk")
    with pytest.raises(AlignmentError, match=r"junk\.parquet holds no maps"):
        read_maps(tmp_path / "junk.parquet")
