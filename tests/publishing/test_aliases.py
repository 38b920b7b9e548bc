"""An alias remembers where it pointed, and goes back there."""

import pytest

from tests.publishing.conftest import build_table
from userrep.publishing.aliases import HISTORY_TAG, MAX_HISTORY, history_of, rollback
from userrep.publishing.connection import RegistryError, UnknownVersionError
from userrep.publishing.registry import move_alias, publish
from userrep.publishing.versions import resolve


@pytest.fixture
def three(tmp_path, name, sqlite_uri) -> str:
    """Name of a table with three versions, of which `champion` has seen all."""
    for seed in range(3):
        build_table(tmp_path / f"t{seed}", num_users=5, seed=seed)
        publish(tmp_path / f"t{seed}", name, "champion", tracking_uri=sqlite_uri, experiment="tables")
    return name


def points_to(name: str, uri: str) -> int:
    return resolve(f"{name}@champion", tracking_uri=uri).version


def test_rollbacks_go_back_one_by_one(three, sqlite_uri):
    assert rollback(three, "champion", tracking_uri=sqlite_uri) == (3, 2)
    assert rollback(three, "champion", tracking_uri=sqlite_uri) == (2, 1)
    with pytest.raises(UnknownVersionError, match="no version that it pointed to before is left"):
        rollback(three, "champion", tracking_uri=sqlite_uri)
    assert points_to(three, sqlite_uri) == 1


def test_the_history_is_of_moves_not_of_versions(three, sqlite_uri):
    move_alias(three, "champion", 1, tracking_uri=sqlite_uri)
    move_alias(three, "champion", 1, tracking_uri=sqlite_uri)  # again, as after a crash
    assert rollback(three, "champion", tracking_uri=sqlite_uri) == (1, 3)


def test_a_move_that_was_killed_half_way_rolls_back_right(three, sqlite_uri, fresh_client):
    fresh_client.set_registered_model_tag(three, HISTORY_TAG + "champion", "1,2,3")  # noted, and not moved
    assert rollback(three, "champion", tracking_uri=sqlite_uri) == (3, 2)


def test_aliases_that_cannot_go_back_are_explained(three, sqlite_uri, fresh_client):
    with pytest.raises(UnknownVersionError, match="no alias 'stable'; its aliases: champion"):
        rollback(three, "stable", tracking_uri=sqlite_uri)
    fresh_client.set_registered_model_tag(three, HISTORY_TAG + "champion", "1;2")
    with pytest.raises(RegistryError, match="correct it in MLflow"):
        rollback(three, "champion", tracking_uri=sqlite_uri)


def test_the_history_does_not_outgrow_its_tag(three, sqlite_uri, fresh_client):
    fresh_client.set_registered_model_tag(three, HISTORY_TAG + "champion", ",".join(["1", "2"] * MAX_HISTORY))
    move_alias(three, "champion", 2, tracking_uri=sqlite_uri)
    tags = fresh_client.get_registered_model(three).tags
    assert history_of(tags, "champion") == ([1, 2] * MAX_HISTORY + [3])[-MAX_HISTORY:]
