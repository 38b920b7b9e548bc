"""Connections: bounded waiting, nothing created by mistake, no secrets in messages."""

import os
import subprocess
import sys
from subprocess import PIPE

import pytest

from tests.publishing.conftest import left_in
from userrep.publishing import connection
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


@pytest.mark.parametrize("end", ["killed", "another process was faster"])
def test_a_database_appears_whole_or_not_at_all(tmp_path, monkeypatch, end):
    def make(tracking_uri):
        (tmp_path / tracking_uri.rpartition("/")[2].removesuffix("?timeout=9")).write_text("half")
        if end == "killed":
            raise KeyboardInterrupt
        (tmp_path / "mlflow.db").write_text("whole, and with runs in it")

    monkeypatch.setattr(connection, "MlflowClient", make)
    if end == "killed":
        with pytest.raises(KeyboardInterrupt):
            connection._create_sqlite(f"sqlite:///{tmp_path / 'mlflow.db'}?timeout=9")
        assert not (tmp_path / "mlflow.db").exists()
    else:
        connection._create_sqlite(f"sqlite:///{tmp_path / 'mlflow.db'}?timeout=9")
        assert left_in(tmp_path) == ["mlflow.db"]
        assert (tmp_path / "mlflow.db").read_text().startswith("whole")


@pytest.mark.slow
def test_a_database_that_two_processes_make_at_once_is_whole(tmp_path):
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    code = (
        "import sys; from userrep.publishing.connection import connect\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "with connect(sys.argv[1], create=True) as client: client.create_experiment(sys.argv[2])"
    )
    makers = [
        subprocess.Popen([sys.executable, "-c", code, uri, name], stdin=PIPE, stdout=PIPE, text=True)
        for name in ("one", "other")
    ]
    assert [maker.stdout.readline() for maker in makers] == ["ready\n"] * 2
    for maker in makers:
        maker.communicate("go\n")
    assert [maker.returncode for maker in makers] == [0, 0]
    with connect(uri) as client:
        assert {experiment.name for experiment in client.search_experiments()} == {"Default", "one", "other"}
    assert left_in(tmp_path) == ["mlflow.db"]


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
