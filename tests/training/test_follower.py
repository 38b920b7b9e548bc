"""The process that sends a run while it trains, against real servers: one that hangs, one that dies, none."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.support.mlflow_server import MlflowServer, wait_until
from tests.training.test_replay import Job, expected_points, make_run_dir, train
from userrep.publishing.connection import connect
from userrep.training import follower
from userrep.training.follower import LIVE_LIMITS, Follower, follow
from userrep.training.replay import Replay, find_run, send_run
from userrep.training.run_record import RunRecord
from userrep.training.tracking import SPOOL_NAME

# SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run_dir(tmp_path)


def status_of(uri: str, run_dir: Path) -> str | None:
    with connect(uri) as client:
        run_id = find_run(client, "userrep", RunRecord.read(run_dir).key)
        return client.get_run(run_id).info.status if run_id else None


def points_of(client: MlflowClient, run_id: str) -> set[tuple]:
    keys = client.get_run(run_id).data.metrics
    points = [point for key in keys for point in client.get_metric_history(run_id, key)]
    counts = Counter((point.key, point.step) for point in points)
    assert set(counts.values()) == {1}
    return {(p.key, "nan" if p.value != p.value else p.value, p.step, p.timestamp) for p in points}


def test_a_server_that_never_answers_holds_up_neither_start_nor_end(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3600")  # who waited for a request would wait for an hour
    monkeypatch.setattr(follower, "DRAIN_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = Follower(run_dir, f"http://127.0.0.1:{server.getsockname()[1]}")
        train(run_dir, 1, 3)
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4) == b"GET "  # it has asked, and waits
            reason = process.finish("FINISHED")
            assert reason is not None
            assert "not done" in reason
            assert process._process.poll() is None
    assert process._process.wait() == 1  # by itself: the connection is gone


def test_no_server_at_all_is_said_in_one_line(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "DRAIN_S", 60)
    with socket.create_server(("127.0.0.1", 0)) as server:
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
    process = Follower(run_dir, uri)
    train(run_dir, 1, 3)
    reason = process.finish("FAILED")
    assert reason is not None
    assert reason.startswith(f"no answer from the MLflow server {uri}")


def test_a_job_that_is_killed_leaves_no_running_run(tmp_path: Path, run_dir: Path, empty_mlflow_db: Path) -> None:
    uri = f"sqlite:///{shutil.copyfile(empty_mlflow_db, tmp_path / 'mlflow.db')}"
    train(run_dir, 1, 5)
    code = (
        "import sys; from pathlib import Path; from userrep.training.follower import Follower; "
        "follower = Follower(Path(sys.argv[1]), sys.argv[2]); print('started', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run_dir), uri]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "started\n"
        os.kill(job.pid, signal.SIGKILL)
    wait_until(lambda: status_of(uri, run_dir) == "KILLED")
    RunRecord.read(run_dir).model_copy(update={"status": "FINISHED"}).write(run_dir)  # the next job has completed it
    sent = send_run(run_dir, uri, waits=True)
    assert (sent.num_values, sent.status) == (0, "FINISHED")
    with connect(uri) as client:
        assert points_of(client, sent.run_id) == expected_points(run_dir / SPOOL_NAME)
    assert status_of(uri, run_dir) == "FINISHED"


@pytest.mark.slow
def test_a_server_killed_at_step_10_and_back_at_step_80_has_every_point(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")

    class Outage(Job):
        def wait(self, seconds: float) -> str | None:
            if self.step == 10:
                server.kill()
            if self.step == 80:
                server.start()
            return super().wait(seconds)

    with server:
        replay = Replay(run_dir, server.uri, LIVE_LIMITS, is_live=True)
        assert follow(replay, Outage(run_dir, 100).wait) is None
        with connect(server.uri) as client:
            points = points_of(client, replay.run_id)
            assert points == expected_points(run_dir / SPOOL_NAME)
            assert sorted(step for key, _, step, _ in points if key == "train/loss") == list(range(1, 101))
            assert client.get_run(replay.run_id).info.status == "FINISHED"
        # Everything once more: what a lost cursor, or a second `userrep sync-tracking`, does.
        (run_dir / "tracking.cursor.json").unlink()
        assert send_run(run_dir, server.uri, waits=False).num_values == len(points)
        with connect(server.uri) as client:
            assert points_of(client, replay.run_id) == points
