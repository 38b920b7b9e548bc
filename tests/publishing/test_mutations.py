"""Damaged or forged tables, manifests and answers of the registry: the published table, or an error that explains."""

import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from tests.publishing.conftest import build_table
from tests.publishing.mutation import mutate_directory, mutated_bytes, mutated_value
from userrep.manifest import IncompleteTableError, sha256_file
from userrep.publishing.client import PulledTable, TransferError, pull, pull_version
from userrep.publishing.connection import RegistryError
from userrep.publishing.lookup import lookup_ids
from userrep.publishing.versions import TableVersion

EXPLAINED = (IncompleteTableError, RegistryError, TransferError)
IDS = [f"user-{number}" for number in range(12)]


class Table:
    """A published table, another one of the same shape, and what the registry says of the first."""

    def __init__(self, folder: Path) -> None:
        self.directory, self.other, self.folder = folder / "table", folder / "other", folder
        self.rows = build_table(self.directory, num_users=len(IDS), seed=1)
        build_table(self.other, num_users=len(IDS), seed=2)
        facts = json.loads((self.directory / "manifest.json").read_text())["facts"]
        self.tags = {
            "manifest_sha256": sha256_file(self.directory / "manifest.json"),
            "table_sha256": facts["table_sha256"],
            "model_id": "m-1",
        }
        self.version = TableVersion(
            "users", 1, (), self.tags["table_sha256"], self.tags["manifest_sha256"], "m-1", "", self.tags, 0
        )

    def check(self, pulled: Any) -> None:
        """Whatever was accepted has the rows that were published, for every way to read it."""
        table = PulledTable(pulled.directory, pulled.manifest, pulled.version)
        assert table.dataset().to_table().sort_by("user_id").equals(self.rows)
        found = lookup_ids(pulled.directory, IDS)
        assert found.equals(self.rows.take(pa.array([self.rows["user_id"].to_pylist().index(one) for one in IDS])))


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Table:
    return Table(tmp_path_factory.mktemp("mutations"))


def is_accepted(seed: int, attempt: Callable[[], None]) -> bool:
    """Whether there was no error; only those that explain themselves are let pass."""
    try:
        attempt()
    except EXPLAINED as error:
        if len(str(error)) > 20:
            return False
        raise
    except Exception as error:
        raise AssertionError(f"seed {seed}: {type(error).__name__}: {error}") from error
    return True


@pytest.mark.parametrize("count", [300, pytest.param(8000, marks=pytest.mark.slow)])
def test_a_mutated_table_is_refused_or_the_same(table, tmp_path, sqlite_uri, count):
    accepted, to = 0, tmp_path / "copy"
    for seed in range(count):
        source, stored = random.Random(seed), tmp_path / "stored"
        shutil.copytree(table.directory, stored)
        mutate_directory(source, stored, table.other)
        version = replace(table.version, location=stored.as_uri())
        if source.random() < 0.5 and (stored / "manifest.json").is_file():  # whoever has also changed the tag
            version = replace(version, manifest_sha256=sha256_file(stored / "manifest.json"))
        is_same = is_accepted(seed, lambda: table.check(pull_version(version, to, tracking_uri=sqlite_uri)))  # noqa: B023
        assert to.exists() == is_same, f"seed {seed}"
        accepted += is_same
        for path in tmp_path.iterdir():  # a copy, and what an error in between has left to be resumed
            shutil.rmtree(path)
    assert 0 < accepted < count / 2


class Registry(BaseHTTPRequestHandler):
    """Answers of an MLflow server, by the end of the path; those that it has not are empty objects."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        body = next((body for end, body in self.server.answers.items() if path.endswith(end)), b"{}")
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def registry() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_a_mutated_answer_gives_an_error_or_the_published_table(table, tmp_path, registry, count):
    version = {
        "name": "users",
        "version": "1",
        "creation_timestamp": 1_700_000_000_000,
        "status": "READY",
        "source": "models:/m-1",
        "run_id": "r",
        "aliases": ["champion"],
        "tags": [{"key": key, "value": value} for key, value in table.tags.items()],
    }
    answers = {
        "/registered-models/alias": {"model_version": version},
        "/model-versions/get-download-uri": {"artifact_uri": table.directory.as_uri()},
    }
    uri, to, accepted = f"http://127.0.0.1:{registry.server_address[1]}", tmp_path / "copy", 0
    for seed in range(count):
        source = random.Random(seed)
        bodies = {end: json.dumps(answer).encode() for end, answer in answers.items()}
        end = source.choice(list(answers))
        if source.random() < 0.6:
            bodies[end] = json.dumps(mutated_value(source, answers[end])).encode()
        else:
            bodies[end] = mutated_bytes(source, bodies[end])
        registry.answers = bodies
        is_same = is_accepted(seed, lambda: table.check(pull("users@champion", to, tracking_uri=uri)))
        assert to.exists() == is_same, f"seed {seed}"
        accepted += is_same
        for path in tmp_path.iterdir():
            shutil.rmtree(path)
    assert 0 < accepted < count


@pytest.mark.parametrize("location", ["", "../x", "/etc/passwd", "a\0b", "x" * 5000, "file://T/../?x", "file://T/..#x"])
def test_a_place_that_is_none_is_explained(table, tmp_path, registry, location):
    version = {"name": "users", "version": "1", "tags": [{"key": k, "value": v} for k, v in table.tags.items()]}
    registry.answers = {
        "/registered-models/alias": json.dumps({"model_version": version}).encode(),
        "/model-versions/get-download-uri": json.dumps(
            {"artifact_uri": location.replace("T", str(table.directory))}
        ).encode(),
    }
    with pytest.raises(EXPLAINED):
        pull("users@champion", tmp_path / "copy", tracking_uri=f"http://127.0.0.1:{registry.server_address[1]}")
