"""Small tables, one sqlite registry per session (its tables take a second to create), one MLflow server per session."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from mlflow import MlflowClient

from tests.support.mlflow_server import MlflowServer
from userrep.publishing.connection import connect
from userrep.publishing.registry import publish
from userrep.publishing.table import bucket_of, finish_table, write_part
from userrep.schema import user_embeddings

FACTS = {"encoder_digest": "e" * 12, "tokenizer_digest": "t" * 12, "data_digest": "d" * 12, "code_version": "abc1234"}
NUM_BUCKETS = 3


def pytest_configure(config: pytest.Config) -> None:
    # MLflow 3.17 maps its tables with a loader that SQLAlchemy 2.1 deprecates, once per process.
    config.addinivalue_line("filterwarnings", "ignore:The ``noload`` loader strategy is deprecated")


def unit_vectors(source: random.Random, num_rows: int, column: pa.FixedSizeListType) -> pa.Array:
    flat = []
    for _ in range(num_rows):
        values = [source.gauss(0.0, 1.0) for _ in range(column.list_size)]
        norm = sum(value * value for value in values) ** 0.5
        flat += [value / norm for value in values]
    return pa.FixedSizeListArray.from_arrays(pa.array(flat, pa.float32()).cast(column.value_type), type=column)


def unit_rows(
    user_ids: list[str], dim: int = 8, dtype: str = "float32", seed: int = 0, tasks: Sequence[str] = ()
) -> pa.Table:
    """Users with random unit vectors; without numpy, as the code under test."""
    source = random.Random(seed)
    schema = user_embeddings(dim, dtype, tasks)
    columns = [
        pa.array(user_ids, pa.string()),
        unit_vectors(source, len(user_ids), schema.field("embedding").type),
        pa.array(range(1, len(user_ids) + 1), pa.int32()),
        pa.array([None if index % 5 == 0 else 1_700_000_000 + index for index in range(len(user_ids))], pa.int64()),
        *(unit_vectors(source, len(user_ids), schema.field("embedding").type) for _ in tasks),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def build_table(
    directory: Path,
    num_users: int = 40,
    seed: int = 0,
    dtype: str = "float32",
    tasks: Sequence[str] = (),
    **facts: object,
) -> pa.Table:
    """Writes a committed table and returns its rows as one Arrow table sorted by user id."""
    directory.mkdir(parents=True)
    rows = unit_rows([f"user-{index}" for index in range(num_users)], dtype=dtype, seed=seed, tasks=tasks)
    buckets = [bucket_of(user_id, NUM_BUCKETS) for user_id in rows["user_id"].to_pylist()]
    parts = [
        write_part(directory, bucket, rows.filter(pa.array([mine == bucket for mine in buckets])))
        for bucket in range(NUM_BUCKETS)
    ]
    finish_table(
        directory,
        parts=parts,
        dim=8,
        dtype=dtype,
        tasks=tasks,
        facts={**FACTS, "created_at": "2026-01-01T00:00:00+00:00", **facts},
        config={"seed": seed},
        inputs={"shards": "s" * 12},
    )
    return rows.sort_by("user_id")


@pytest.fixture
def table_dir(tmp_path: Path) -> Path:
    build_table(tmp_path / "built")
    return tmp_path / "built"


@pytest.fixture(scope="session")
def sqlite_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    with connect(uri, create=True) as client:
        client.search_experiments()
    return uri


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A table name of this test's own, since the registry is shared."""
    return "".join(char if char.isalnum() else "-" for char in request.node.name).strip("-")


@pytest.fixture
def published(table_dir: Path, name: str, sqlite_uri: str) -> str:
    """Name of a table with one version, `champion`."""
    publish(table_dir, name, "champion", tracking_uri=sqlite_uri, experiment="tables")
    return name


@pytest.fixture
def fresh_client(sqlite_uri: str) -> MlflowClient:
    return MlflowClient(tracking_uri=sqlite_uri, registry_uri=sqlite_uri)


@pytest.fixture(scope="session")
def server_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with MlflowServer(tmp_path_factory.mktemp("server")) as server:
        yield server.uri


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
