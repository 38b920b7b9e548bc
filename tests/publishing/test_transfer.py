"""Interrupted pulls go on where they stopped; two at once do not disturb each other."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from tests.publishing.conftest import build_table, left_in
from userrep.publishing import transfer
from userrep.publishing.client import TableMismatchError, TransferError, pull, resolve
from userrep.publishing.connection import RegistryError
from userrep.publishing.registry import publish
from userrep.publishing.transfer import sole_pull


@pytest.fixture
def fetched(monkeypatch) -> list[str]:
    """Names of the files that were downloaded."""
    names, download = [], transfer.download_artifacts

    def recorded(artifact_uri, dst_path, tracking_uri):
        names.append(artifact_uri.rpartition("/")[2])
        return download(artifact_uri=artifact_uri, dst_path=dst_path, tracking_uri=tracking_uri)

    monkeypatch.setattr(transfer, "download_artifacts", recorded)
    monkeypatch.setattr(transfer, "DOWNLOADS_AT_ONCE", 1)  # so that all before the one that fails have arrived
    return names


def interrupt_at(monkeypatch, name: str, error: BaseException):
    """Makes the download of a file leave half of it and raise."""
    download = transfer.download_artifacts

    def broken(artifact_uri, dst_path, tracking_uri):
        if artifact_uri.endswith(name):
            (Path(dst_path) / name).write_bytes(b"half")
            (Path(dst_path) / f"{name}.tmp").write_bytes(b"half")
            raise error
        return download(artifact_uri=artifact_uri, dst_path=dst_path, tracking_uri=tracking_uri)

    monkeypatch.setattr(transfer, "download_artifacts", broken)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (MlflowException("gone"), RegistryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError("full"), TransferError),
    ],
    ids=["server", "user", "disk"],
)
def test_an_interrupted_pull_goes_on_where_it_stopped(
    published, table_dir, tmp_path, sqlite_uri, fetched, monkeypatch, error, seen
):
    with monkeypatch.context() as patch:
        interrupt_at(patch, "part-00001.parquet", error)
        with pytest.raises(seen):
            pull(f"{published}@champion", tmp_path / "to" / "copy", tracking_uri=sqlite_uri)
    assert [name.rpartition(".")[2] for name in left_in(tmp_path / "to")] == ["pulling"]
    fetched.clear()
    steps = []
    pulled = pull(
        f"{published}@champion",
        tmp_path / "to" / "copy",
        tracking_uri=sqlite_uri,
        on_progress=lambda done, total: steps.append((done, total)),
    )
    assert {"manifest.json", "part-00001.parquet"} <= set(fetched)
    assert "part-00000.parquet" not in fetched
    assert steps[-1][0] == steps[-1][1] == sum(entry.size_bytes for entry in pulled.manifest.files)
    assert steps == sorted(steps)
    for path in table_dir.iterdir():
        assert (pulled.directory / path.name).read_bytes() == path.read_bytes()
    assert left_in(tmp_path / "to") == ["copy"]


def test_what_another_version_has_left_is_removed(published, tmp_path, sqlite_uri, monkeypatch):
    to = tmp_path / "to" / "copy"
    with monkeypatch.context() as patch:
        interrupt_at(patch, "part-00001.parquet", MlflowException("gone"))
        with pytest.raises(RegistryError):
            pull(f"{published}@champion", to, tracking_uri=sqlite_uri)
    (to.parent / ".copy.2.0123456789ab.pulling").mkdir()  # of another destination
    build_table(tmp_path / "new", seed=1)
    publish(tmp_path / "new", published, "champion", tracking_uri=sqlite_uri, experiment="tables")
    pull(f"{published}@champion", to, tracking_uri=sqlite_uri)
    assert left_in(to.parent) == [".copy.2.0123456789ab.pulling", "copy"]


def test_a_wrong_file_among_those_that_arrived_keeps_nothing(published, tmp_path, sqlite_uri):
    files = Path(resolve(f"{published}@v1", tracking_uri=sqlite_uri).location.removeprefix("file://"))
    part = files / "part-00002.parquet"
    part.write_bytes(part.read_bytes()[::-1])
    with pytest.raises(TableMismatchError, match="nothing was kept"):
        pull(f"{published}@champion", tmp_path / "to" / "copy", tracking_uri=sqlite_uri)
    assert left_in(tmp_path / "to") == []


def test_a_second_pull_to_a_destination_waits_for_the_first(tmp_path):
    to, order = tmp_path / "copy", []
    waits = threading.Event()

    def second():
        waits.set()
        with sole_pull(to):
            order.append("second")

    with sole_pull(to):
        thread = threading.Thread(target=second)
        thread.start()
        waits.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert left_in(tmp_path) == []


def test_a_killed_pull_blocks_nobody_and_loses_nothing(tmp_path):
    to = tmp_path / "copy"
    code = (
        "import os, sys; from pathlib import Path; from userrep.publishing.transfer import sole_pull\n"
        "with sole_pull(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(to)], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    (tmp_path / ".copy.superseded").mkdir()
    with sole_pull(to):  # killed between the two renames of a commit
        assert left_in(tmp_path) == [".copy.lock", "copy"]
    assert left_in(tmp_path) == ["copy"]


def test_a_place_that_cannot_be_written_is_explained(published, tmp_path, sqlite_uri):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TransferError, match=r"cannot write beside .*file/copy"):
        pull(f"{published}@champion", tmp_path / "file" / "copy", tracking_uri=sqlite_uri)
