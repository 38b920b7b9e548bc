"""What a user sees of tracking: training without MLflow, `sync-tracking`, publishing, `doctor --fix`."""

import shutil
import socket
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import doctor
from pipelines.cli import app
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Job
from pipelines.mlflow_store import local_tracking_uri
from pipelines.tracking import RUNS, run_id_of, tracked
from tests.training.test_replay import CONFIG, train
from userrep.publishing.connection import RegistryError, connect
from userrep.training import follower
from userrep.training.heartbeat import SILENCE_LIMIT_S, end_lost_run, find_lost_runs
from userrep.training.replay import HEARTBEAT_TAG
from userrep.training.run_record import RunRecord

# SQLAlchemy 2.1 deprecates a loading option that MLflow 3.17 uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*noload.*")


class SpyConsole(Console):
    def __init__(self) -> None:
        super().__init__()
        self.said = ""

    def say(self, text: str) -> None:
        self.said += text + "\n"


@pytest.fixture
def console() -> SpyConsole:
    return SpyConsole()


@pytest.fixture
def job(tmp_path: Path, empty_mlflow_db: Path, console: SpyConsole, monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_mlflow_db, tmp_path / "mlflow.db")
    return Job(JobConfig(), tmp_path, console)


@pytest.fixture
def dead_uri() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def make_run(job: Job, name: str, status: str) -> Path:
    run_dir = job.workdir / RUNS / name
    run_dir.mkdir(parents=True)
    RunRecord(experiment="userrep", config=CONFIG, status=status).write(run_dir)
    train(run_dir, 1, 5)
    return run_dir


def sync(job: Job, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["sync-tracking", "--workdir", str(job.workdir), *options])
    return result.exit_code, result.output


def test_sync_tracking_sends_every_run_and_can_be_repeated(job: Job, dead_uri: str) -> None:
    make_run(job, "aaaa", "FINISHED")
    make_run(job, "bbbb", "RUNNING")  # its job was killed, with the process that follows it
    code, text = sync(job, "--tracking-uri", dead_uri)
    assert code == 1
    assert text.count("no answer from the MLflow server") == 2
    code, text = sync(job)
    assert code == 0
    assert "aaaa: sent 12 values, FINISHED" in text
    assert "bbbb: sent 12 values, KILLED" in text
    code, text = sync(job)
    assert code == 0
    assert text.count("nothing was missing") == 2
    with connect(local_tracking_uri(job.workdir)) as client:
        runs = client.search_runs([client.get_experiment_by_name("userrep").experiment_id])
        assert {run.info.run_name: run.info.status for run in runs} == {"aaaa": "FINISHED", "bbbb": "KILLED"}


def test_sync_tracking_of_a_directory_without_runs_says_so(job: Job) -> None:
    result = CliRunner().invoke(app, ["sync-tracking", "--workdir", str(job.workdir)])
    assert isinstance(result.exception, ValueError)
    assert "pass the --workdir" in str(result.exception)


def test_a_job_trains_without_mlflow_and_says_what_to_do(job, console, dead_uri, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_uri)
    monkeypatch.setattr(follower, "DRAIN_S", 60)
    run_dir = job.workdir / RUNS / "cccc"
    run_dir.mkdir(parents=True)
    with tracked(job, run_dir, CONFIG):
        train(run_dir, 1, 5)
    assert f"userrep sync-tracking --workdir {job.workdir}" in console.said
    assert RunRecord.read(run_dir).status == "FINISHED"
    with pytest.raises(RegistryError, match="userrep sync-tracking --workdir"):
        run_id_of(job, "cccc", RunRecord.read(run_dir).key)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_how_a_job_ended_is_kept_for_later(job, dead_uri, monkeypatch, error, status) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", dead_uri)
    monkeypatch.setattr(follower, "DRAIN_S", 60)
    run_dir = job.workdir / RUNS / "dddd"
    run_dir.mkdir(parents=True)
    with pytest.raises(error), tracked(job, run_dir, CONFIG):
        raise error
    assert RunRecord.read(run_dir).status == status


def test_an_unusable_uri_is_refused_before_training(job, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///relative.db")
    with pytest.raises(RegistryError, match="relative"), tracked(job, job.workdir, CONFIG):
        pytest.fail("trained")


def test_publishing_sends_a_run_that_mlflow_lacks(job: Job, console: SpyConsole) -> None:
    key = RunRecord.read(make_run(job, "eeee", "FINISHED")).key
    run_id = run_id_of(job, "eeee", key)
    assert "sending training run eeee" in console.said
    console.said = ""
    assert run_id_of(job, "eeee", key) == run_id
    assert console.said == ""
    with pytest.raises(RegistryError, match="is gone"):
        run_id_of(job, "ffff", "no such key")


def test_doctor_ends_lost_runs_and_no_others(job: Job) -> None:
    now = int(time.time())
    uri = local_tracking_uri(job.workdir)
    with connect(uri, create=True) as client:
        experiment = client.create_experiment("any", artifact_location=job.workdir.as_uri())
        ids = {}
        for name, beat in (("lost", now - 2 * SILENCE_LIMIT_S), ("alive", now), ("over", 0), ("foreign", None)):
            tags = {} if beat is None else {HEARTBEAT_TAG: str(beat)}
            ids[name] = client.create_run(experiment, run_name=name, tags=tags).info.run_id
        client.set_terminated(ids["over"], "FINISHED")

    def statuses() -> dict[str, str]:
        with connect(uri) as client:
            return {name: client.get_run(run_id).info.status for name, run_id in ids.items()}

    before = {"lost": "RUNNING", "alive": "RUNNING", "over": "FINISHED", "foreign": "RUNNING"}
    (listed,) = [finding for finding in doctor.diagnose(job.workdir, None) if finding.what.startswith("run ")]
    assert (listed.level, listed.what) == ("WARN", "run lost")
    assert "doctor --fix" in listed.detail
    assert statuses() == before
    result = CliRunner().invoke(app, ["doctor", "--fix", "--workdir", str(job.workdir)])
    assert "run lost: was RUNNING" in result.stdout
    assert statuses() == {**before, "lost": "KILLED"}
    with connect(uri) as client:
        assert client.get_run(ids["lost"]).info.end_time == 1000 * (now - 2 * SILENCE_LIMIT_S)
        assert find_lost_runs(client, now) == []
        later = find_lost_runs(client, now + 2 * SILENCE_LIMIT_S)
        assert [run.name for run in later] == ["alive"]
        end_lost_run(client, later[0])
    assert statuses()["alive"] == "KILLED"
