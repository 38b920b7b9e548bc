"""References and lists: what exists is found, what does not is answered with what exists."""

import pytest

from userrep.publishing.client import TableSummary, list_tables, resolve
from userrep.publishing.connection import RegistryError, UnknownTableError, UnknownVersionError


def test_unknown_names_aliases_and_versions_list_what_exists(published, sqlite_uri):
    with pytest.raises(UnknownTableError, match=f"did you mean .*{published}"):
        resolve(f"{published}s@champion", tracking_uri=sqlite_uri)
    for reference in (f"{published}@champ", f"{published}@v7", f"{published}/7"):
        with pytest.raises(UnknownVersionError, match=r"@champion \(v1\); versions, newest first: v1"):
            resolve(reference, tracking_uri=sqlite_uri)


@pytest.mark.parametrize("reference", ["users", "users@", "users/", "users/x", "../users@a", "a@b@c", "users@v1/2", ""])
def test_malformed_references_are_explained(sqlite_uri, reference):
    with pytest.raises(RegistryError, match="name@alias, name@v12 or name/12"):
        resolve(reference, tracking_uri=sqlite_uri)


def test_a_model_that_is_no_table_is_refused(sqlite_uri, name, fresh_client):
    fresh_client.create_registered_model(name)
    fresh_client.create_model_version(name, source="s3://bucket/model")
    with pytest.raises(RegistryError, match="is no embedding table"):
        resolve(f"{name}/1", tracking_uri=sqlite_uri)


def test_tables_are_listed_with_their_aliases(published, sqlite_uri, fresh_client):
    fresh_client.create_registered_model(f"{published}-other")
    listed = {summary.name: summary for summary in list_tables(tracking_uri=sqlite_uri)}
    assert listed[published] == TableSummary(published, 1, {"champion": 1})
    assert f"{published}-other" not in listed
