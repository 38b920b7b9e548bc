"""Nearest rows: against a naive reference, at any block size, with ties."""

import numpy as np
import pytest

from tests.publishing.matrices import unit_matrix, write_matrix
from userrep.publishing import nearest as module
from userrep.publishing.nearest import NearestError, nearest, nearest_to_ids
from userrep.publishing.pairs import matrix
from userrep.publishing.table import read_table


def naive(directory, query_QD, k):
    """All cosines in float64, sorted."""
    rows = read_table(directory).to_table()
    table_ND, ids = matrix(rows, "embedding").astype(np.float64), rows["user_id"].to_pylist()
    table_ND /= np.linalg.norm(table_ND, axis=1, keepdims=True)
    cosine_QN = query_QD / np.linalg.norm(query_QD, axis=1, keepdims=True) @ table_ND.T
    order = [sorted(range(len(ids)), key=lambda row: (-round(cosine_N[row], 12), ids[row])) for cosine_N in cosine_QN]
    return [[(ids[row], cosine_N[row]) for row in rows[:k]] for rows, cosine_N in zip(order, cosine_QN, strict=True)]


def by_query(found, count):
    rows = found.to_pylist()
    return [[(row["id"], row["cosine"]) for row in rows if row["query"] == query] for query in range(count)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("block", "queries", "pairs"), [(7, 3, 5), (16_384, 256, 16_384)], ids=["small", "whole"])
def test_found_are_the_nearest_of_all(tmp_path, monkeypatch, dtype, block, queries, pairs):
    for name, value in (("ROWS_AT_ONCE", block), ("QUERIES_AT_ONCE", queries), ("PAIRS_AT_ONCE", pairs)):
        monkeypatch.setattr(module, name, value)
    vectors = unit_matrix(101, 16, seed=0)
    write_matrix(tmp_path / "t", vectors.astype(np.float16) if dtype == "float16" else vectors, dtype=dtype)
    query_QD = np.random.default_rng(1).standard_normal((8, 16)) * 3
    found = by_query(nearest(tmp_path / "t", query_QD, 10), 8)
    for mine, expected in zip(found, naive(tmp_path / "t", query_QD, 10), strict=True):
        assert [one for one, _ in mine] == [one for one, _ in expected]
        assert [cosine for _, cosine in mine] == pytest.approx([cosine for _, cosine in expected], abs=1e-12)


@pytest.mark.parametrize("block", [4, 16_384])
def test_equal_vectors_come_by_id_wherever_they_lie(tmp_path, monkeypatch, block):
    monkeypatch.setattr(module, "ROWS_AT_ONCE", block)
    vectors = np.repeat(unit_matrix(3, 16, seed=0), 20, axis=0)
    ids = [f"user-{number:02d}" for number in np.random.default_rng(0).permutation(60)]
    write_matrix(tmp_path / "t", vectors, ids)
    found = nearest(tmp_path / "t", vectors[:1], 12)
    assert found["id"].to_pylist() == sorted(ids[:20])[:12]


def test_a_table_of_fewer_rows_gives_all_and_an_empty_one_none(tmp_path):
    write_matrix(tmp_path / "few", unit_matrix(2, 8, seed=0))
    write_matrix(tmp_path / "none", unit_matrix(0, 8, seed=0))
    assert nearest(tmp_path / "few", np.ones((2, 8)), 5)["query"].to_pylist() == [0, 0, 1, 1]
    assert nearest(tmp_path / "none", np.ones((2, 8)), 5).num_rows == 0


def test_neighbours_of_a_user_leave_out_the_user(tmp_path):
    vectors = unit_matrix(30, 16, seed=0)
    write_matrix(tmp_path / "t", vectors)
    found = nearest_to_ids(tmp_path / "t", ["user-000007", "user-000003"], 4)
    assert found["query"].to_pylist() == ["user-000007"] * 4 + ["user-000003"] * 4
    cosine_N = vectors @ vectors[7]
    expected = [f"user-{row:06d}" for row in np.argsort(-cosine_N)[1:5]]
    assert found["id"].to_pylist()[:4] == expected


def test_a_users_nearest_rows_of_another_table(tmp_path):
    users, others = unit_matrix(5, 16, seed=0), unit_matrix(20, 16, seed=1)
    write_matrix(tmp_path / "users", users)
    write_matrix(tmp_path / "others", others, [f"other-{number}" for number in range(20)])
    found = nearest_to_ids(tmp_path / "users", ["user-000002"], 1, among=tmp_path / "others")
    assert found["id"].to_pylist() == [f"other-{int(np.argmax(others @ users[2]))}"]
    write_matrix(tmp_path / "retrained", others, encoder_digest="f" * 12)
    with pytest.raises(NearestError, match="one table is of encoder eeeeeeeeeeee, the other of ffffffffffff"):
        nearest_to_ids(tmp_path / "users", ["user-000002"], 1, among=tmp_path / "retrained")


def test_a_column_of_a_task(tmp_path):
    universal, task = unit_matrix(9, 16, seed=0), unit_matrix(9, 16, seed=1)
    write_matrix(tmp_path / "t", universal, tasks={"buys": task})
    found = nearest(tmp_path / "t", task[4:5], 1, column="embedding_buys")
    assert found["id"].to_pylist() == ["user-000004"]


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (np.ones((1, 7)), 1, r"the shape \(1, 7\); wanted \(queries, 8\)"),
        (np.ones(8), 1, r"the shape \(8,\)"),
        (np.zeros((1, 8)), 1, "query 0 has norm 0.0"),
        (np.full((1, 8), np.nan), 1, "query 0 has norm nan"),
        (np.full((1, 8), "a"), 1, "wanted are numbers"),
        (np.ones((1, 8)), 0, "k is 0"),
    ],
    ids=["width", "flat", "zero", "nan", "text", "k"],
)
def test_what_cannot_be_asked_is_explained(tmp_path, queries, k, message):
    write_matrix(tmp_path / "t", unit_matrix(3, 8, seed=0))
    with pytest.raises(NearestError, match=message):
        nearest(tmp_path / "t", queries, k)
    with pytest.raises(NearestError, match=r"'nobody' has no row .* users without events have none"):
        nearest_to_ids(tmp_path / "t", ["nobody"], 1)
