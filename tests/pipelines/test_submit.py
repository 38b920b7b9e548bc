"""Submitting: twice is once, an attempt that failed is followed by the next one, and no secret goes along."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus
from typer.testing import CliRunner

from pipelines import job_server
from pipelines.cli import app
from pipelines.console import Console
from pipelines.submit import Placement, Submitted, choose_environment, redact_uri, submit
from pipelines.submit_attempts import attempt_number, latest_attempt, next_attempt
from pipelines.submit_command import StageCommand
from pipelines.submit_package import Package, find_package
from tests.pipelines.job_client import ADDRESS, FakeClient, details, server_of
from userrep.config import ConfigError

SECRET = "s3cret-of-the-cluster"
WORDS = ("run", "--config", "submitted_config.yaml", "--workdir", "/mnt/a b", "--set", "name=$(id)")
COMMAND = StageCommand("run", WORDS, "/mnt/a b", "0123456789ab", {"submitted_config.yaml": b"name: x"})
BASE = "userrep-run-0123456789ab"


@pytest.fixture(scope="module")
def package() -> Package:
    return find_package()


def put(client: FakeClient, package: Package, **arguments: Any) -> Submitted:
    return submit(server_of(client, SECRET), COMMAND, package, {}, Console(), **arguments)


def submitted_runs(client: FakeClient) -> list[str]:
    return [job["submission_id"] for job in client.submitted if job["submission_id"].startswith(BASE)]


def test_attempts_of_an_id() -> None:
    assert [attempt_number(text, "a-b") for text in ("a-b", "a-b-2", "a-b-13", "a-bc", "a-b-2-3", "xa-b")] == [
        *(1, 2, 13, 0, 0, 0)
    ]
    jobs = {name: details(name, JobStatus.FAILED) for name in ("a", "a-10", "a-9", "other-11")}
    latest = latest_attempt(jobs, "a")
    assert latest is not None
    assert latest.submission_id == "a-10"
    assert next_attempt(latest, "a") == "a-11"
    assert next_attempt(latest_attempt(jobs, "b"), "b") == "b"


def test_a_job_has_code_command_and_named_variables_alone(package: Package) -> None:
    client = FakeClient()
    server, variables = server_of(client, SECRET), {"A": "value-of-a"}
    done = submit(server, COMMAND, package, variables, Console(), Placement("python3.11", 2.0))
    assert done == Submitted(BASE, is_new=True)
    probe, job = client.submitted
    assert probe["submission_id"].startswith("userrep-versions-")
    assert job["entrypoint"] == (
        "python3.11 -m pipelines.cli run --config submitted_config.yaml --workdir '/mnt/a b' --set 'name=$(id)'"
    )
    assert job["runtime_env"]["env_vars"] == variables
    assert set(job["runtime_env"]) == {"working_dir", "env_vars"}
    assert not Path(job["runtime_env"]["working_dir"]).exists()
    assert job["metadata"] == {"userrep": "run", "workdir": "/mnt/a b", "package": package.digest}
    assert job["entrypoint_num_cpus"] == 2.0
    assert SECRET not in json.dumps(client.submitted)


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_twice_is_once(status: JobStatus, package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient()
    client.put(BASE, status, metadata={"package": package.digest})
    assert put(client, package) == Submitted(BASE, is_new=False)
    assert client.submitted == []
    said = capsys.readouterr().err
    assert "already" in said
    assert "other code" not in said


def test_a_job_that_runs_other_code_is_told(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    client = FakeClient()
    client.put(BASE, JobStatus.RUNNING, metadata={"package": "another"})
    assert not put(client, package).is_new
    assert "runs other code" in capsys.readouterr().err


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_what_has_failed_is_submitted_as_the_next_attempt(status: JobStatus, package: Package) -> None:
    client = FakeClient()
    client.put(BASE, status)
    assert put(client, package) == Submitted(f"{BASE}-2", is_new=True)
    client.put(f"{BASE}-2", status)
    assert put(client, package) == Submitted(f"{BASE}-3", is_new=True)
    assert put(client, package) == Submitted(f"{BASE}-3", is_new=False)  # has succeeded
    assert put(client, package, again=True) == Submitted(f"{BASE}-4", is_new=True)
    assert len([job for job in client.submitted if "versions" in job["submission_id"]]) == 1


def test_two_commands_at_once_are_one_job(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    submit_job = client.submit_job

    def after_another(*, submission_id: str, entrypoint: str, **arguments: Any) -> str:
        if submission_id == BASE:
            client.put(BASE, JobStatus.RUNNING)
        return submit_job(submission_id=submission_id, entrypoint=entrypoint, **arguments)

    monkeypatch.setattr(client, "submit_job", after_another)
    assert put(client, package) == Submitted(BASE, is_new=False)

    def refuse(*, submission_id: str, entrypoint: str, **arguments: Any) -> str:
        raise RuntimeError("Request failed with status code 500: no agent.")

    other = FakeClient()
    monkeypatch.setattr(other, "submit_job", refuse)
    with pytest.raises(RuntimeError, match="no agent"):
        put(other, package)


@pytest.mark.parametrize("place", ["words", "file"])
def test_the_token_goes_nowhere(place: str, package: Package) -> None:
    words = (*WORDS, "--set", f"name={SECRET}") if place == "words" else WORDS
    sent = {"submitted_config.yaml": f"name: {SECRET}".encode()} if place == "file" else {}
    client = FakeClient()
    with pytest.raises(ConfigError, match="holds the cluster's token") as refused:
        submit(server_of(client, SECRET), StageCommand("run", words, "/a", "x", sent), package, {}, Console())
    assert client.submitted == []
    assert SECRET not in str(refused.value)


def test_variables_are_named_and_have_their_values_from_here() -> None:
    here = {"A": "1", "B": "2", "MLFLOW_TRACKING_URI": "http://mlflow", "C": f"x{SECRET}"}
    assert choose_environment([], {}) == {}
    assert choose_environment(["A"], here, SECRET) == {"A": "1", "MLFLOW_TRACKING_URI": "http://mlflow"}
    for name, message in (
        ("A=value-s3", "no name of a variable"),
        ("ABSENT", "no such variable"),
        ("RAY_AUTH_TOKEN", "leave it out"),
        ("RAY_AUTH_TOKEN_PATH", "leave it out"),
        ("RAY_ADDRESS", "leave it out"),
        ("C", "holds the cluster's token"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            choose_environment([name], here | {"RAY_AUTH_TOKEN": SECRET}, SECRET)
        assert "s3" not in str(refused.value)


def test_what_is_said_holds_no_values(package: Package, capsys: pytest.CaptureFixture[str]) -> None:
    variables = {"MLFLOW_TRACKING_URI": "http://user:pa55@mlflow:5000/x", "PASSWORD": "pa55word"}
    submit(server_of(FakeClient()), COMMAND, package, variables, Console())
    said = capsys.readouterr().err
    assert "http://[redacted]@mlflow:5000/x" in said
    assert "PASSWORD" in said
    assert "pa55" not in said
    assert redact_uri("sqlite:////mnt/mlflow.db") == "sqlite:////mnt/mlflow.db"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    made = FakeClient()
    monkeypatch.setattr(job_server, "JobSubmissionClient", lambda address, headers: made)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return made


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, [*words, "--address", ADDRESS])


SMOKE = ("run", "--config", "smoke", "--workdir", "/mnt/a")


def test_the_command_line_returns_the_exit_code_of_the_job(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    first = invoke("submit", *SMOKE)
    assert first.exit_code == 0, first.output
    submission_id = first.stdout.strip()
    assert submission_id == client.submitted[-1]["submission_id"]
    client.put(submission_id, JobStatus.RUNNING, metadata={"userrep": "run", "workdir": "/mnt/a"})
    assert invoke("submit", *SMOKE, "--verbose").stdout.strip() == submission_id
    client.pieces, client.logs[submission_id] = [["line 1\n", "line 2\n"]], "line 1\nline 2\nline 3\n"
    # Options of submit may stand before the command, too.
    tail = client.tail_job_logs

    def ends_meanwhile(job: str) -> Any:
        client.put(submission_id, JobStatus.FAILED, driver_exit_code=3, metadata={"userrep": "run"})
        return tail(job)

    monkeypatch.setattr(client, "tail_job_logs", ends_meanwhile)
    followed = invoke("submit", "--follow", *SMOKE)
    assert followed.exit_code == 3
    assert followed.stdout == "line 1\nline 2\nline 3\n"


def test_ctrl_c_detaches(client: FakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(submission_id: str) -> str:
        raise KeyboardInterrupt

    submission_id = invoke("submit", *SMOKE).stdout.strip()
    monkeypatch.setattr(client, "get_job_info", interrupt)
    client.put(submission_id, JobStatus.RUNNING)
    result = invoke("submit", *SMOKE, "--wait")
    assert result.exit_code == 130
    for words in (f"userrep jobs logs {submission_id} --follow", f"userrep jobs stop {submission_id}", "goes on"):
        assert words in result.output
    assert client.known[submission_id].status == JobStatus.RUNNING


def test_jobs_are_listed_shown_and_stopped(client: FakeClient) -> None:
    mine = {"userrep": "run", "workdir": "/mnt/a"}
    secret = {"env_vars": {"PASSWORD": "pa55word"}}
    client.put("mine", JobStatus.RUNNING, start_time=2000, metadata=mine, runtime_env=secret)
    client.put("early", JobStatus.FAILED, start_time=1000, driver_exit_code=7, metadata=mine)
    client.put("foreign", JobStatus.RUNNING, start_time=3000)
    client.logs["mine"] = "at work\n"
    lines = invoke("jobs", "list").stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["early", "FAILED"], ["mine", "RUNNING"]]
    assert " 7 " in lines[0]
    assert "foreign" in invoke("jobs", "list", "--all").stdout
    assert "pa55word" not in "".join(lines)
    assert invoke("jobs", "logs", "mine").stdout == "at work\n"
    assert "being stopped" in invoke("jobs", "stop", "mine").output
    assert client.known["mine"].status == JobStatus.STOPPED
    assert "ended already" in invoke("jobs", "stop", "mine").output
    client.pieces = [["at work\n"]]
    assert invoke("jobs", "logs", "early", "--follow").exit_code == 7
