"""Connections: bounded waiting, nothing created by mistake, no secrets in messages."""

import os

import pytest

from tests.publishing.conftest import left_in
from userrep.publishing.client import list_tables, pull
from userrep.publishing.connection import UnreachableRegistryError, connect, redacted


def test_a_dead_server_is_reported_at_once(tmp_path):
    # Port 9 (discard) of this machine: nothing listens, so the connection is refused without waiting.
    with pytest.raises(UnreachableRegistryError, match=r"no answer from the MLflow server http://127\.0\.0\.1:9 "):
        pull("users@champion", tmp_path / "copy", tracking_uri="http://someone:secret@127.0.0.1:9")
    assert left_in(tmp_path) == []


def test_a_missing_database_is_not_created(tmp_path):
    with pytest.raises(UnreachableRegistryError, match=r"no database .*typo\.db"):
        list_tables(tracking_uri=f"sqlite:///{tmp_path / 'typo.db'}")
    assert left_in(tmp_path) == []


def test_limits_are_set_for_the_call_and_a_users_own_stay(sqlite_uri, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    with connect(sqlite_uri):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
        assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


def test_secrets_do_not_reach_messages():
    assert redacted("https://me:secret@host:5000/path") == "https://host:5000/path"
    assert redacted("http://host:5000") == "http://host:5000"
