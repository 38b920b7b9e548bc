"""Releases: the gate stands before the alias, maps lie beside versions, vectors come back in any version's space."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from sklearn.linear_model import LogisticRegression

from tests.publishing.conftest import left_in
from tests.publishing.matrices import rotated, unit_matrix, write_matrix
from userrep.manifest import read_manifest
from userrep.publishing.alignment import AlignmentError
from userrep.publishing.client import PulledTable, TableMismatchError, pull, resolve
from userrep.publishing.gate import GateConfig, GateRefusedError
from userrep.publishing.pairs import matrix
from userrep.publishing.release import Release, promote, release

METRIC = "test/recall_at_10"
ROWS, DIM = 400, 16
BASE = unit_matrix(ROWS, DIM, seed=0)


def released(folder: Path, name: str, uri: str, vectors: np.ndarray, value: float = 0.5, **changes) -> Release:
    """A table of these vectors, released as a new version."""
    options = {key: changes.pop(key) for key in ("dtype", "tasks", "id_space") if key in changes}
    directory = folder / f"built-{len(left_in(folder))}"
    write_matrix(directory, vectors, num_evaluated=1000, **options)
    arguments = {"alias": "champion", "tracking_uri": uri, "experiment": "tables", "metrics": {METRIC: value}}
    return release(directory, name, **{**arguments, **changes})


def in_order(table: PulledTable, column: str = "embedding") -> np.ndarray:
    return matrix(table.dataset().to_table().sort_by("user_id"), column)


def test_a_first_release_has_nothing_to_compare_with(tmp_path, name, sqlite_uri, fresh_client):
    done = released(tmp_path, name, sqlite_uri, BASE)
    assert (done.published.version, done.report) == (1, None)
    assert "userrep.previous" not in fresh_client.get_model_version(name, "1").tags


def test_a_worse_version_is_refused_and_leaves_nothing(tmp_path, name, sqlite_uri, fresh_client):
    released(tmp_path, name, sqlite_uri, BASE)
    with pytest.raises(
        GateRefusedError, match=r"stays at version 1.*\n.*0\.5000 -> 0\.3000.*\n.*--set publish.gate.force"
    ):
        released(tmp_path, name, sqlite_uri, rotated(BASE, 1), value=0.3)
    assert resolve(f"{name}@champion", tracking_uri=sqlite_uri).version == 1
    assert len(fresh_client.search_model_versions(f"name='{name}'")) == 1


def test_force_releases_and_is_recorded(tmp_path, name, sqlite_uri):
    released(tmp_path, name, sqlite_uri, BASE)
    done = released(tmp_path, name, sqlite_uri, rotated(BASE, 1), value=0.3, gate=GateConfig(force=True))
    version = resolve(f"{name}@champion", tracking_uri=sqlite_uri)
    record = json.loads(version.tags["userrep.forced.champion"])
    assert (done.published.version, version.version) == (2, 2)
    assert (record["against"], list(record["overridden"])) == (1, [METRIC])
    assert record["by"]
    assert record["at"].startswith("20")


def test_a_release_carries_its_map_and_the_report(tmp_path, name, sqlite_uri):
    released(tmp_path, name, sqlite_uri, BASE)
    done = released(tmp_path, name, sqlite_uri, rotated(BASE, 1, noise=0.2))
    version = resolve(f"{name}@champion", tracking_uri=sqlite_uri)
    assert (version.tags["userrep.previous"], set(json.loads(version.tags["userrep.release"]))) == (
        "1",
        {"alignment.parquet", "gate.json"},
    )
    assert done.report is not None
    assert done.report.drift["embedding: the same after the map"] > 0.97
    assert pull(f"{name}@champion", tmp_path / "copy", tracking_uri=sqlite_uri).manifest == read_manifest(
        tmp_path / "built-1"
    )


def test_a_promotion_asks_the_gate_too(tmp_path, name, sqlite_uri):
    released(tmp_path, name, sqlite_uri, BASE)
    released(tmp_path, name, sqlite_uri, rotated(BASE, 1), value=0.3, alias="candidate")
    candidate = resolve(f"{name}@candidate", tracking_uri=sqlite_uri)
    with pytest.raises(GateRefusedError, match="stays at version 1"):
        promote(candidate, "champion", tracking_uri=sqlite_uri)
    assert resolve(f"{name}@champion", tracking_uri=sqlite_uri).version == 1
    done = promote(candidate, "champion", tracking_uri=sqlite_uri, gate=GateConfig(force=True))
    assert done.before == 1
    after = resolve(f"{name}@champion", tracking_uri=sqlite_uri)
    assert (after.version, "userrep.forced.champion" in after.tags) == (2, True)
    assert promote(after, "fresh", tracking_uri=sqlite_uri).report is None


def test_a_probe_of_the_old_version_goes_on_working_on_the_aligned_new_one(tmp_path, name, sqlite_uri):
    answers = BASE @ np.random.default_rng(7).standard_normal(DIM) > 0
    released(tmp_path, name, sqlite_uri, BASE)
    released(tmp_path, name, sqlite_uri, rotated(BASE, 1, noise=0.1))
    old = in_order(pull(f"{name}@v1", tmp_path / "old", tracking_uri=sqlite_uri))
    new = in_order(pull(f"{name}@v2", tmp_path / "new", tracking_uri=sqlite_uri))
    turned = pull(f"{name}@v2", tmp_path / "turned", tracking_uri=sqlite_uri, aligned_to="v1")
    probe, held_out = LogisticRegression(C=100.0).fit(old[::2], answers[::2]), slice(1, None, 2)
    accuracy = {
        what: probe.score(vectors[held_out], answers[held_out])
        for what, vectors in (("old", old), ("aligned", in_order(turned)), ("unaligned", new))
    }
    assert accuracy["old"] > 0.95
    assert accuracy["aligned"] >= 0.99 * accuracy["old"]
    assert accuracy["unaligned"] == pytest.approx(0.5, abs=0.15)  # chance
    fact = turned.manifest.facts["aligned"]
    assert (fact["from_version"], fact["to_version"], len(fact["steps"])) == (2, 1, 1)
    assert fact["steps"][0]["columns"]["embedding"]["mean_cosine"] > 0.99
    assert "into the space of version 1" in (tmp_path / "turned" / "card.md").read_text()


SPACES = [rotated(BASE, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def branched(tmp_path_factory, sqlite_uri) -> str:
    """Name of a table with four versions, one of int8; the fourth comes after the second, beside the third."""
    folder, name = tmp_path_factory.mktemp("branched"), "branched"
    for number, vectors in enumerate(SPACES[:3]):
        released(folder, name, sqlite_uri, vectors, dtype="int8" if number == 1 else "float32")
    promote(resolve(f"{name}@v2", tracking_uri=sqlite_uri), "stable", tracking_uri=sqlite_uri)
    released(folder, name, sqlite_uri, SPACES[3], alias="stable")
    return name


@pytest.mark.parametrize(("source", "target"), [(3, 1), (1, 3), (4, 3), (2, 2)])
def test_maps_are_composed_along_any_way(branched, tmp_path, sqlite_uri, source, target):
    turned = pull(f"{branched}@v{source}", tmp_path / "turned", tracking_uri=sqlite_uri, aligned_to=f"v{target}")
    assert np.allclose(in_order(turned), SPACES[target - 1], atol=1e-2)
    steps = [(step["from"], step["to"]) for step in turned.manifest.facts["aligned"]["steps"]]
    assert steps == {(3, 1): [(3, 2), (2, 1)], (1, 3): [(1, 2), (2, 3)], (4, 3): [(4, 2), (2, 3)]}.get(
        (source, target), []
    )
    assert turned.manifest.facts["dtype"] == "float32"


def test_an_aligned_copy_is_kept_and_replaced_like_any_other(tmp_path, name, sqlite_uri):
    for seed in range(2):
        released(tmp_path, name, sqlite_uri, rotated(BASE, seed))
    to = tmp_path / "copy"
    pull(f"{name}@v2", to, tracking_uri=sqlite_uri)
    turned = pull(f"{name}@champion", to, tracking_uri=sqlite_uri, aligned_to="1")
    written = (to / "part-00000.parquet").stat().st_mtime_ns
    assert pull(f"{name}@champion", to, tracking_uri=sqlite_uri, aligned_to="v1").manifest == turned.manifest
    assert (to / "part-00000.parquet").stat().st_mtime_ns == written
    assert "aligned" not in pull(f"{name}@v2", to, tracking_uri=sqlite_uri).manifest.facts
    (to / "mine.txt").write_text("mine")
    with pytest.raises(TableMismatchError, match=r"mine\.txt"):
        pull(f"{name}@v2", to, tracking_uri=sqlite_uri, aligned_to="v1")
    assert [path for path in left_in(tmp_path) if path.startswith(".")] == []


def test_only_columns_that_both_versions_have_are_turned(tmp_path, name, sqlite_uri):
    task = unit_matrix(ROWS, DIM, seed=4)
    released(tmp_path, name, sqlite_uri, BASE, tasks={"buys": task})
    released(tmp_path, name, sqlite_uri, rotated(BASE, 1), tasks={"buys": rotated(task, 2), "new": task})
    turned = pull(f"{name}@v2", tmp_path / "turned", tracking_uri=sqlite_uri, aligned_to="v1")
    assert turned.manifest.facts["tasks"] == ["buys"]
    assert np.allclose(in_order(turned, "embedding_buys"), task, atol=2e-3)


def test_other_widths_are_explained(tmp_path, name, sqlite_uri):
    released(tmp_path, name, sqlite_uri, BASE)
    released(tmp_path, name, sqlite_uri, unit_matrix(ROWS, 8, seed=1), gate=GateConfig(force=True))
    with pytest.raises(AlignmentError, match="8 dimensions, those of the version before 16"):
        pull(f"{name}@v2", tmp_path / "copy", tracking_uri=sqlite_uri, aligned_to="v1")
    assert not (tmp_path / "copy").exists()


def test_versions_that_were_published_without_maps_are_explained(tmp_path, name, sqlite_uri, fresh_client):
    for seed in range(2):
        released(tmp_path, name, sqlite_uri, rotated(BASE, seed))
    fresh_client.delete_model_version_tag(name, "2", "userrep.previous")
    with pytest.raises(AlignmentError, match="no chain of maps leads from version 2"):
        pull(f"{name}@v2", tmp_path / "copy", tracking_uri=sqlite_uri, aligned_to="v1")


def test_a_map_that_was_changed_is_refused(tmp_path, name, sqlite_uri, fresh_client: MlflowClient):
    for seed in range(2):
        released(tmp_path, name, sqlite_uri, rotated(BASE, seed))
    path = Path(resolve(f"{name}@v2", tracking_uri=sqlite_uri).location.removeprefix("file://")) / "release"
    (path / "alignment.parquet").write_bytes(b"other")
    with pytest.raises(TableMismatchError, match=r"the map of version 2 .* has sha256"):
        pull(f"{name}@v2", tmp_path / "copy", tracking_uri=sqlite_uri, aligned_to="v1")


def test_a_damaged_version_in_use_is_named(tmp_path, name, sqlite_uri):
    released(tmp_path, name, sqlite_uri, BASE)
    files = Path(resolve(f"{name}@v1", tracking_uri=sqlite_uri).location.removeprefix("file://"))
    (files / "part-00001.parquet").write_bytes(b"damaged")
    with pytest.raises(TableMismatchError, match="version 1 is not what was published"):
        released(tmp_path, name, sqlite_uri, rotated(BASE, 1))
