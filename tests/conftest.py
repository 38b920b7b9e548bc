"""One Ray cluster per session, started by the first test that asks for it."""

import os

# Read when Ray is imported, also by the processes that it starts.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.object_store import ObjectStore, address_of_this_session

os.environ |= address_of_this_session()


def pytest_configure(config: pytest.Config) -> None:
    # Ray Data 2.60 sets its own deprecated fields when its DataContext is made.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:ray.data.context")


@pytest.fixture(scope="session")
def empty_mlflow_db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, to be copied: making one takes seconds."""
    from userrep.publishing.connection import connect

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with connect(f"sqlite:///{path}", create=True) as client:
        client.search_experiments()
    return path


@pytest.fixture(scope="session")
def _object_store() -> Iterator[ObjectStore]:
    with ObjectStore() as store:
        yield store


@pytest.fixture
def bucket(_object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new bucket, `s3://NAME`, and a node of its own: a scratch directory that is empty."""
    monkeypatch.setenv("USERREP_SCRATCH", str(tmp_path / "scratch"))
    return _object_store.make_bucket()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a local cluster with 2 CPUs, to which this process is connected."""
    import ray

    # Not any other cluster that runs on this machine.
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
