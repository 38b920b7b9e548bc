"""Two tables side by side: each id once, whatever the parts; ids of another kind are refused."""

import numpy as np
import pytest

from tests.publishing.matrices import unit_matrix, write_matrix
from userrep.publishing import pairs
from userrep.publishing.id_space import IdSpaceMismatchError
from userrep.publishing.pairs import TablePair


@pytest.mark.parametrize("buckets", [(3, 3), (3, 5), (1, 4)])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "int8"), ("int8", "float16")])
def test_every_id_comes_once_and_meets_its_other_self(tmp_path, monkeypatch, buckets, dtypes):
    monkeypatch.setattr(pairs, "RANGE_ROWS", 7)
    vectors = unit_matrix(60, 8, seed=0)
    ids = [f"user-{number:03d}" for number in range(60)]
    write_matrix(tmp_path / "old", vectors[:50], ids[:50], buckets=buckets[0], dtype=dtypes[0])
    write_matrix(tmp_path / "new", vectors[20:], ids[20:], buckets=buckets[1], dtype=dtypes[1])
    old_ids, new_ids, common = [], [], 0
    for share in TablePair(tmp_path / "old", tmp_path / "new").shares(["embedding"]):
        old_ids += share.old["user_id"].to_pylist()
        new_ids += share.new["user_id"].to_pylist()
        common += len(share.places[0])
        old_ND, new_ND = share.vectors("embedding")
        assert np.allclose(old_ND, new_ND, atol=0.02)
    assert (sorted(old_ids), sorted(new_ids), common) == (ids[:50], ids[20:], 30)


def test_ids_of_another_space_are_refused(tmp_path):
    for name in ("shop", "cinema"):
        write_matrix(tmp_path / name, unit_matrix(20, 8, seed=0), id_space=name)
    with pytest.raises(IdSpaceMismatchError, match="id space 'shop', those of the other of 'cinema'"):
        TablePair(tmp_path / "shop", tmp_path / "cinema")
    write_matrix(tmp_path / "silent", unit_matrix(20, 8, seed=0))
    TablePair(tmp_path / "shop", tmp_path / "silent")
