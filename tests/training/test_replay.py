"""A spool becomes exactly one point per step and metric in MLflow, whatever happens to training, MLflow and replay."""

import json
import os
import tempfile
import time
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.support.fake_mlflow import URI, FakeMlflow, FakeRun
from userrep.publishing.connection import RegistryError
from userrep.training import replay as replay_module
from userrep.training.follower import LIVE_LIMITS, follow
from userrep.training.replay import (
    BATCH_METRICS,
    CURSOR_NAME,
    HEARTBEAT_TAG,
    Replay,
    RunBusyError,
    find_run,
    send_run,
    sole_sender,
)
from userrep.training.run_record import RunRecord
from userrep.training.tracking import SPOOL_NAME, MetricSpool, read_points

CONFIG = {"seed": 0, "model": {"dim": 8, "text": "x" * 900}}


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> FakeMlflow:
    fake = FakeMlflow()
    monkeypatch.setattr(replay_module, "connect", fake.connect)
    return fake


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run_dir(tmp_path)


def make_run_dir(parent: Path) -> Path:
    directory = parent / "0123456789ab"
    directory.mkdir()
    RunRecord(experiment="userrep", config=CONFIG).write(directory)
    return directory


def train(run_dir: Path, first: int, last: int, started_ms: int = 10**6) -> None:
    """An attempt that takes the steps first..last; it validates at every third, and saves at steps of its own."""
    spool = MetricSpool(run_dir / SPOOL_NAME)
    for step in range(first, last + 1):
        metrics = {"train/loss": 1 / step, "time/step_s": (started_ms % 97 + step) / 64}
        if step % 3 == 0:
            metrics["val/loss"] = float("nan") if step % 2 else 2 / step
        if (step + started_ms // 10**5) % 4 == 0:
            metrics["time/checkpoint_stall_s"] = step / 8
        spool.write(step, started_ms + step, metrics)
        if step % 3 == 0:  # before the checkpoint is committed
            with (run_dir / SPOOL_NAME).open("rb") as stream:
                os.fsync(stream.fileno())
    spool.close()


def live(run_dir: Path) -> Replay:
    return Replay(run_dir, URI, LIVE_LIMITS, is_live=True)


def expected_points(spool: Path) -> set[tuple]:
    """Values of the first point of every step, by the plainest of readers."""
    first: dict[int, list[tuple]] = {}
    for line in spool.read_text().split("\n")[:-1]:
        if not line.endswith("}}"):
            continue  # torn
        point = json.loads(line)
        step, time_ms = point["step"], point["time_ms"]
        values = [(k, "nan" if v != v else v, step, time_ms) for k, v in point["metrics"].items()]
        first.setdefault(step, values)
    return {value for values in first.values() for value in values}


def assert_all_there(run: FakeRun, spool: Path) -> None:
    assert run.points == expected_points(spool)
    assert len({(key, step) for key, _, step, _ in run.points}) == len(run.points)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(0, 7), st.integers(1, 9)),
        st.tuples(st.just("flush"), st.lists(st.sampled_from(["none", "none", "before", "after"]), max_size=9)),
        st.tuples(st.just("kill in a write"), st.integers(1, 40)),
        st.tuples(st.just("power cut"), st.floats(0, 1)),
        st.tuples(st.just("new process")),
        st.tuples(st.just("cursor lost")),
        st.tuples(st.just("cursor damaged")),
    ),
    max_size=14,
)


@given(actions=ACTIONS)
@settings(max_examples=200, deadline=None)
def test_every_step_of_a_metric_arrives_once(actions: list[tuple]) -> None:
    mlflow, durable_size, clock_ms = FakeMlflow(), 0, 10**6
    with tempfile.TemporaryDirectory() as parent, pytest.MonkeyPatch.context() as patch:
        run_dir = make_run_dir(Path(parent))
        spool = run_dir / SPOOL_NAME
        spool.touch()

        def fsync(descriptor: int) -> None:
            nonlocal durable_size
            facts = os.fstat(descriptor)
            if facts.st_ino == spool.stat().st_ino:
                durable_size = facts.st_size

        patch.setattr(os, "fsync", fsync)
        patch.setattr(replay_module, "connect", mlflow.connect)
        patch.setattr(replay_module, "BATCH_METRICS", 5)
        replay = live(run_dir)
        for action, *values in actions:
            steps = [point["step"] for point, _ in read_points(spool)]
            match action:
                case "train":  # from a checkpoint: all points up to it are in the spool
                    first = max(0, (steps or [0])[-1] - values[0]) + 1
                    clock_ms += 10**5
                    train(run_dir, first, first + values[1], clock_ms)
                case "flush":
                    mlflow.faults.extend(values[0])
                    try:
                        replay.flush()
                    except RegistryError:
                        mlflow.faults.clear()
                case "kill in a write":
                    with spool.open("ab") as stream:
                        stream.write(b'{"step": 999, "time_ms": 1, "metrics": {"train/loss": 1.0'[: values[0]])
                case "power cut":
                    os.truncate(spool, durable_size + int(values[0] * (spool.stat().st_size - durable_size)))
                case "new process":
                    replay = live(run_dir)
                case "cursor lost":
                    (run_dir / CURSOR_NAME).unlink(missing_ok=True)
                    replay = live(run_dir)
                case "cursor damaged":
                    (run_dir / CURSOR_NAME).write_text("{")
                    replay = live(run_dir)
        mlflow.faults.clear()
        sent = send_run(run_dir, URI, waits=False)
        run = next(run for run in mlflow.runs if run.run_id == sent.run_id)
        train(run_dir, 1, 1)  # ends a torn last line, and repeats the first step if there is any
        send_run(run_dir, URI, waits=False)
        assert_all_there(run, spool)
        assert run.status == "KILLED"


def test_sending_twice_changes_nothing_even_without_the_cursor(mlflow: FakeMlflow, run_dir: Path) -> None:
    train(run_dir, 1, 10)
    train(run_dir, 7, 12, started_ms=2 * 10**6)
    first = send_run(run_dir, URI, waits=False)
    before = set(mlflow.runs[0].points)
    again = send_run(run_dir, URI, waits=False)
    assert (first.num_values, again.num_values) == (len(before), 0)
    (run_dir / CURSOR_NAME).unlink()
    assert send_run(run_dir, URI, waits=False).num_values == len(before)
    assert mlflow.runs[0].points == before
    assert_all_there(mlflow.runs[0], run_dir / SPOOL_NAME)
    assert [point[0] for point in mlflow.runs[0].history("train/loss")] == list(range(1, 13))
    assert len(mlflow.runs) == 1


def test_another_mlflow_gets_everything(mlflow: FakeMlflow, run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(run_dir, 1, 5)
    send_run(run_dir, URI, waits=False)
    other = FakeMlflow()
    other.runs.append(FakeRun("someone else's", "userrep", {}, 0))
    monkeypatch.setattr(replay_module, "connect", other.connect)
    send_run(run_dir, URI, waits=False)
    assert_all_there(other.runs[1], run_dir / SPOOL_NAME)


def test_a_database_that_is_replaced_meanwhile_gets_everything(mlflow: FakeMlflow, run_dir: Path) -> None:
    train(run_dir, 1, 5)
    replay = live(run_dir)
    replay.flush()
    mlflow.runs.clear()
    mlflow.runs.append(FakeRun("someone else's", "userrep", {}, 0))
    train(run_dir, 6, 8)
    with pytest.raises(StopIteration):  # the fake's way to say that it knows no such run
        replay.flush()
    replay.flush()
    assert_all_there(mlflow.runs[1], run_dir / SPOOL_NAME)


def test_batches_are_as_large_as_mlflow_takes_them(mlflow: FakeMlflow, run_dir: Path) -> None:
    train(run_dir, 1, 1000)
    live(run_dir).flush()
    sizes = mlflow.batch_sizes[1:]  # the first one holds the parameters
    assert sum(sizes) == 2 * 1000 + 333 + 250
    assert max(sizes) <= BATCH_METRICS
    assert len(sizes) == 3


def test_the_run_is_described_as_it_was(mlflow: FakeMlflow, run_dir: Path) -> None:
    train(run_dir, 1, 4, started_ms=5_000)
    RunRecord.read(run_dir).model_copy(update={"status": "FINISHED"}).write(run_dir)
    sent = send_run(run_dir, URI, waits=False)
    run = mlflow.runs[0]
    assert run.params == {"seed": "0", "model.dim": "8", "model.text": "x" * 500}
    assert (run.start_ms, run.end_ms, run.status) == (5_001, 5_004, "FINISHED")  # however late it was sent
    with mlflow.connect(URI):
        key = RunRecord.read(run_dir).key
        assert find_run(mlflow, "userrep", key) == sent.run_id
        assert find_run(mlflow, "userrep", "another") is None
        assert find_run(mlflow, "another", key) is None


def test_the_same_training_in_another_directory_is_another_run(mlflow: FakeMlflow, tmp_path: Path) -> None:
    for number in range(2):
        parent = tmp_path / str(number)
        parent.mkdir()
        run_dir = make_run_dir(parent)
        train(run_dir, 1, 4, started_ms=number)
        for _ in range(2):  # it goes on, in its run
            RunRecord.start(run_dir, "userrep", CONFIG)
            live(run_dir).flush()
        assert_all_there(mlflow.runs[number], run_dir / SPOOL_NAME)
    assert len(mlflow.runs) == 2


def test_a_run_without_points_is_sent_as_well(mlflow: FakeMlflow, run_dir: Path) -> None:
    assert send_run(run_dir, URI, waits=False).num_values == 0
    assert mlflow.runs[0].status == "KILLED"


class Job:
    """Stands for a job that trains: takes a step whenever the follower waits, and then ends."""

    def __init__(self, run_dir: Path, num_steps: int) -> None:
        self.run_dir, self.num_steps, self.step = run_dir, num_steps, 0

    def wait(self, seconds: float) -> str | None:
        self.step += 1
        train(self.run_dir, self.step, self.step)
        return "FINISHED" if self.step == self.num_steps else None


def test_mlflow_away_between_two_steps_costs_no_point(mlflow: FakeMlflow, run_dir: Path) -> None:
    class Outage(Job):
        def wait(self, seconds: float) -> str | None:
            mlflow.is_down = 10 <= self.step < 80
            return super().wait(seconds)

    assert follow(live(run_dir), Outage(run_dir, 100).wait) is None
    run = mlflow.runs[0]
    assert_all_there(run, run_dir / SPOOL_NAME)
    assert [step for step, _, _ in run.history("train/loss")] == list(range(1, 101))
    assert run.status == "FINISHED"


def test_mlflow_away_for_the_whole_run_is_said_at_the_end(mlflow: FakeMlflow, run_dir: Path) -> None:
    mlflow.is_down = True
    assert follow(live(run_dir), Job(run_dir, 20).wait) == "no answer"
    mlflow.is_down = False
    assert send_run(run_dir, URI, waits=False).num_values == 2 * 20 + 6 + 5
    assert_all_there(mlflow.runs[0], run_dir / SPOOL_NAME)


def test_the_heartbeat_keeps_its_interval(mlflow, run_dir, monkeypatch) -> None:
    monkeypatch.setattr(replay_module, "HEARTBEAT_S", 3600)
    follow(live(run_dir), Job(run_dir, 10).wait)
    assert mlflow.beats == 1
    mlflow.runs[0].tags[HEARTBEAT_TAG] = "0"
    monkeypatch.setattr(replay_module, "HEARTBEAT_S", 0)
    live(run_dir).flush()
    assert abs(int(mlflow.runs[0].tags[HEARTBEAT_TAG]) - time.time()) < 3600
    assert mlflow.beats > 1


def test_a_live_run_that_was_taken_for_dead_is_running_again(mlflow, run_dir, monkeypatch) -> None:
    monkeypatch.setattr(replay_module, "HEARTBEAT_S", 0)
    replay = live(run_dir)
    replay.flush()
    mlflow.runs[0].status = "KILLED"
    replay.flush()
    assert mlflow.runs[0].status == "RUNNING"


def test_only_one_process_sends_a_run(mlflow: FakeMlflow, run_dir: Path) -> None:
    with sole_sender(run_dir, waits=True), pytest.raises(RunBusyError, match=run_dir.name):
        send_run(run_dir, URI, waits=False)
    assert mlflow.runs == []
    send_run(run_dir, URI, waits=False)
