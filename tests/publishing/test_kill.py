"""kill -9 anywhere in a release: the version in use stays as it is, and a rerun finishes the release."""

import random
from pathlib import Path

import pytest

from tests.publishing.conftest import build_table
from tests.publishing.killed import release_killed
from userrep.manifest import Manifest
from userrep.publishing.client import list_tables, pull, resolve
from userrep.publishing.gate import GateConfig
from userrep.publishing.release import release
from userrep.publishing.versions import list_versions


def released(folder: Path, name: str, uri: str) -> int:
    done = release(folder, name, "champion", tracking_uri=uri, experiment="killed", gate=GateConfig(force=True))
    return done.published.version


def content(manifest: Manifest) -> str:
    return manifest.facts["table_sha256"]


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_release_that_is_killed_anywhere_leaves_the_old_version_and_can_be_run_again(
    tmp_path, name, sqlite_uri, kills
):
    source, copy = random.Random(kills), tmp_path / "copy"
    build_table(tmp_path / "t0", num_users=40, seed=0)
    released(tmp_path / "t0", name, sqlite_uri)
    build_table(tmp_path / "t1", num_users=40, seed=1)
    points = release_killed(tmp_path / "t1", name, sqlite_uri, None)
    assert points is not None
    assert points > 50  # or the count has missed most of what a release does
    version, killed = 2, 0
    while killed < kills:
        old = resolve(f"{name}@champion", tracking_uri=sqlite_uri)
        assert old.version == version
        # Drawn from as many equal stretches as there are kills, so that they are spread over all of it.
        at = 1 + int((killed + source.random()) / kills * points)
        new_dir = tmp_path / f"t{version + 1}"
        build_table(new_dir, num_users=40, seed=version + 1)
        is_killed = release_killed(new_dir, name, sqlite_uri, at) is None
        killed += is_killed
        assert content(pull(f"{name}@v{version}", copy, tracking_uri=sqlite_uri).manifest) == old.table_sha256
        seen = resolve(f"{name}@champion", tracking_uri=sqlite_uri).version
        assert seen in (version, version + 1)  # the alias moves in one statement
        pull(f"{name}@champion", copy, tracking_uri=sqlite_uri)
        assert list_tables(tracking_uri=sqlite_uri)
        assert released(new_dir, name, sqlite_uri) == version + 1
        version += 1
        champion = pull(f"{name}@champion", copy, tracking_uri=sqlite_uri)
        assert (champion.version.version, champion.manifest.config) == (version, {"seed": version})
    numbers = [one.version for one in list_versions(name, tracking_uri=sqlite_uri)]
    assert numbers == list(range(1, version + 1))  # and no rerun made a second one
