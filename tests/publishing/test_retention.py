"""Old versions go, what is asked for stays: aliases, rollbacks, and maps across what is gone."""

from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from tests.publishing.conftest import left_in
from tests.publishing.matrices import rotated, unit_matrix, write_matrix
from userrep.publishing.client import pull, resolve
from userrep.publishing.connection import UnknownVersionError
from userrep.publishing.pairs import matrix
from userrep.publishing.release import release
from userrep.publishing.retention import collect, retention_plan
from userrep.publishing.versions import list_versions

BASE = unit_matrix(200, 8, seed=0)


@pytest.fixture
def five(tmp_path, name, sqlite_uri) -> str:
    """Name of a table with five versions; `pinned` is the first one, `champion` the last."""
    for seed in range(5):
        write_matrix(tmp_path / f"t{seed}", rotated(BASE, seed))
        for alias in ("champion", "pinned") if seed == 0 else ("champion",):
            release(tmp_path / f"t{seed}", name, alias, tracking_uri=sqlite_uri, experiment="tables")
    return name


def doomed(name: str, uri: str, keep_last: int = 0, older_than_days: float = 0) -> list[int]:
    plan = retention_plan(name, keep_last=keep_last, older_than_days=older_than_days, tracking_uri=uri)
    return [verdict.version.version for verdict in plan if verdict.is_deleted]


def test_aliases_rollbacks_the_last_and_the_young_stay(five, sqlite_uri):
    assert doomed(five, sqlite_uri) == [2, 3]  # 1 is pinned, a rollback goes to 4
    assert doomed(five, sqlite_uri, keep_last=3) == [2]
    assert doomed(five, sqlite_uri, older_than_days=1) == []
    plan = retention_plan(five, keep_last=3, older_than_days=0, tracking_uri=sqlite_uri)
    assert [verdict.reason.split(" ")[0] for verdict in plan if not verdict.is_deleted] == [
        "alias",
        "among",
        "a",
        "alias",
    ]
    with pytest.raises(ValueError, match="must be >= 0"):
        doomed(five, sqlite_uri, keep_last=-1)


def test_what_is_deleted_is_gone_and_the_maps_stay(five, tmp_path, sqlite_uri):
    files = Path(resolve(f"{five}@v3", tracking_uri=sqlite_uri).location.removeprefix("file://"))
    plan = retention_plan(five, keep_last=0, older_than_days=0, tracking_uri=sqlite_uri)
    assert collect(plan, tracking_uri=sqlite_uri) == [2, 3]
    assert left_in(files) == ["release"]
    assert [version.version for version in list_versions(five, tracking_uri=sqlite_uri)] == [1, 4, 5]
    with pytest.raises(UnknownVersionError, match=r"version 3 was deleted \(20.* by retention\)"):
        resolve(f"{five}@v3", tracking_uri=sqlite_uri)
    turned = pull(f"{five}@champion", tmp_path / "turned", tracking_uri=sqlite_uri, aligned_to="pinned")
    rows = turned.dataset().to_table().sort_by("user_id")
    assert np.allclose(matrix(rows, "embedding"), rotated(BASE, 0), atol=2e-3)
    assert doomed(five, sqlite_uri) == []


def test_a_deleted_table_published_again_is_a_new_version(five, tmp_path, sqlite_uri):
    collect(retention_plan(five, keep_last=0, older_than_days=0, tracking_uri=sqlite_uri), tracking_uri=sqlite_uri)
    again = release(tmp_path / "t1", five, "champion", tracking_uri=sqlite_uri, experiment="tables")
    assert again.published.version == 6
    assert pull(f"{five}@v6", tmp_path / "copy", tracking_uri=sqlite_uri).dataset().count_rows() == 200


@pytest.mark.parametrize("step", ["delete_model_version_tag", "set_logged_model_tags", "set_model_version_tag"])
def test_an_interrupted_deletion_is_refused_to_readers_and_goes_on(five, sqlite_uri, monkeypatch, step):
    plan, calls = retention_plan(five, keep_last=0, older_than_days=0, tracking_uri=sqlite_uri), []
    real = getattr(MlflowClient, step)

    def fail_late(*arguments, **keywords):
        calls.append(step)
        if step != "set_model_version_tag" or len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, step, fail_late)
        with pytest.raises(KeyboardInterrupt):
            collect(plan, tracking_uri=sqlite_uri)
    with pytest.raises(UnknownVersionError, match="was deleted"):
        resolve(f"{five}@v2", tracking_uri=sqlite_uri)
    again = retention_plan(five, keep_last=0, older_than_days=0, tracking_uri=sqlite_uri)
    assert collect(again, tracking_uri=sqlite_uri) == [2, 3]
    assert doomed(five, sqlite_uri) == []
