"""The MLflow server: its manifests, and the server itself, started as the recipe says, on a real PostgreSQL."""

import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import mlflow
import pytest
import yaml

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_mlflow import SECRET_KEYS, auth_file, database_uri, server_arguments, variables
from tests.support.kubernetes import validate_manifest
from tests.support.mlflow_server import wait_until
from tests.support.postgres import Postgres
from tests.support.rendered import VARIANTS, documents, rendered, texts_below

SERVER_PACKAGES = {"psycopg": "psycopg[binary]", "flask_wtf": "mlflow[auth]"}


def kinds(name: str) -> dict[str, dict[str, Any]]:
    return {d["kind"]: d for file, d in documents(name, "mlflow") if file.endswith("kubernetes.yaml")}


@pytest.mark.parametrize("name", VARIANTS)
def test_manifests_fit_their_schemas(name: str) -> None:
    assert set(kinds(name)) == {"NetworkPolicy", "ConfigMap", "Deployment", "Service"}
    for document in kinds(name).values():
        try:
            validate_manifest(document)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{document['kind']}: {error.message} at {list(error.absolute_path)}")


@pytest.mark.parametrize("name", VARIANTS)
def test_objects_name_each_other(name: str) -> None:
    found = kinds(name)
    pod = found["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    for selector in (
        found["Service"]["spec"]["selector"],
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    names = texts_below(pod["spec"]["volumes"], "configMap")
    assert names == [{"name": found["ConfigMap"]["metadata"]["name"]}]
    # The Host header of every name by which the server can be called must be allowed, with and without the port.
    (allowed,) = [a for a in pod["spec"]["containers"][0]["args"] if a.startswith("--allowed-hosts=")]
    service, namespace = found["Service"]["metadata"]["name"], found["Service"]["metadata"]["namespace"]
    for host in (service, f"{service}.{namespace}.svc", f"{service}.{namespace}.svc.cluster.local", "mlflow.example"):
        assert {host, f"{host}:5000"} <= set(allowed.removeprefix("--allowed-hosts=").split(","))
    assert "*" not in allowed


def test_the_tracking_uri_of_ray_pods_is_the_service() -> None:
    found, values = kinds("default"), ClusterValues()
    meta = found["Service"]["metadata"]
    port = found["Service"]["spec"]["ports"][0]["port"]
    assert values.mlflow_uri == f"http://{meta['name']}.{meta['namespace']}.svc:{port}"


@pytest.mark.parametrize("name", VARIANTS)
def test_compose_is_open_to_the_machine_alone_and_stops_where_a_secret_is_missing(name: str) -> None:
    services = yaml.safe_load(rendered(name, "mlflow")["mlflow/compose.yaml"])["services"]
    server, database = services["mlflow"], services["postgres"]
    assert all(port.startswith("127.0.0.1:") for port in server["ports"])
    assert "ports" not in database
    assert server["read_only"] is True
    for key in SECRET_KEYS:
        assert server["environment"][key] == f"${{{key}:?is not set}}"
    assert database["environment"]["POSTGRES_PASSWORD"] == server["environment"]["PGPASSWORD"]
    assert all("mlflow.example" in word for word in server["command"] if word.startswith("--allowed-hosts"))


def test_no_argument_of_the_server_holds_a_user_or_a_password() -> None:
    arguments = server_arguments(ClusterValues().mlflow, "127.0.0.1", ["localhost"])
    assert not [word for word in arguments if "@" in word or "password" in word.lower()]
    assert database_uri(ClusterValues().mlflow) in auth_file(ClusterValues().mlflow)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str, Postgres]]:
    """Address, password of `admin`, and database of a server that was started by the recipe's arguments."""
    missing = [package for module, package in SERVER_PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"the recipe's server needs {' and '.join(missing)}, which are not installed here")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, database_port = first.getsockname()[1], second.getsockname()[1]
    # Not below tmp_path: its parents let nobody but their owner pass, and PostgreSQL runs as another user.
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        with Postgres(Path(name) / "postgres", database_port) as postgres:
            yield from serving(Path(name), port, postgres)


def serving(root: Path, port: int, postgres: Postgres) -> Iterator[tuple[str, str, Postgres]]:
    recipe = ClusterValues().with_overrides([f"mlflow.port={port}", "mlflow.workers=1"]).mlflow
    arguments = server_arguments(recipe, "127.0.0.1", ["127.0.0.1"])
    # The one difference: no bucket here.
    is_bucket = [word.startswith("--artifacts-destination=s3://") for word in arguments]
    assert sum(is_bucket) == 1
    arguments[is_bucket.index(True)] = f"--artifacts-destination={root / 'files'}"
    (root / "basic_auth.ini").write_text(auth_file(recipe))
    password = secrets.token_hex(16)
    environment = {
        **os.environ,
        **variables(recipe),
        **postgres.environment,
        "MLFLOW_AUTH_CONFIG_PATH": str(root / "basic_auth.ini"),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_AUTH_ADMIN_PASSWORD": password,
    }
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *arguments],
            cwd=root,
            env=environment,
            stdout=log,
            stderr=log,
            process_group=0,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status(f"{uri}/health") == 200 or process.poll() is not None)
        assert process.poll() is None, (root / "log").read_text()
        yield uri, password, postgres
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def status(url: str, host: str | None = None) -> int | None:
    """HTTP status; None where nobody answers."""
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def test_who_has_no_password_gets_nothing(server: tuple[str, str, Postgres]) -> None:
    uri, _, _ = server
    for path in ("/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/api/2.0/mlflow-artifacts/artifacts"):
        assert status(f"{uri}{path}") == 401, path
    assert status(f"{uri}/", host="evil.example") == 403  # by the list of allowed hosts


def test_a_run_goes_to_postgres_and_its_files_through_the_server(
    server: tuple[str, str, Postgres], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, password, postgres = server
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", password)
    client = mlflow.MlflowClient(uri)
    run = client.create_run(client.create_experiment("recipe")).info.run_id
    client.log_metric(run, "loss", 0.25)
    (tmp_path / "card.md").write_text("of a table")
    client.log_artifact(run, str(tmp_path / "card.md"))
    assert client.get_run(run).data.metrics == {"loss": 0.25}
    assert Path(client.download_artifacts(run, "card.md", str(tmp_path))).read_text() == "of a table"
    assert postgres.query("select value from metrics").split() == ["0.25"]
    assert postgres.query("select username from users").split() == ["admin"]
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-" + password)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with pytest.raises(mlflow.MlflowException, match="401"):
        client.get_run(run)
