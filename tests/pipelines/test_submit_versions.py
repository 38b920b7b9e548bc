"""A cluster of other versions is refused before the job is submitted, and asked once."""

import json
import subprocess
import sys

import pytest
from ray.job_submission import JobStatus

from pipelines.console import Console
from pipelines.submit_versions import (
    MARK,
    PROBE,
    check_versions,
    cluster_versions,
    compare_versions,
    local_versions,
)
from tests.pipelines.job_client import FakeClient, server_of
from userrep.config import ConfigError

HERE = local_versions()


def test_python_and_ray_must_be_equal_others_present() -> None:
    assert compare_versions(HERE, HERE).problems == compare_versions(HERE, HERE).differences == []
    patch = HERE["python"].rpartition(".")[0] + ".99"
    found = compare_versions(HERE, HERE | {"python": patch, "ray": "2.59.0", "torch": "2.0.0", "pyarrow": ""})
    assert found.problems == [
        f"python is {HERE['python']} here and {patch} on the cluster",
        f"ray is {HERE['ray']} here and 2.59.0 on the cluster",
        "the cluster lacks pyarrow",
    ]
    assert found.differences == [f"torch is {HERE['torch']} here and 2.0.0 on the cluster"]
    assert compare_versions(HERE, {}).problems[0].endswith("and missing on the cluster")


def test_a_cluster_that_differs_is_refused_and_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"cannot run this job: python is .* here and 3\.9\.1 on the cluster"):
        check_versions(server_of(FakeClient(HERE | {"python": "3.9.1"})), "python", Console())
    check_versions(server_of(FakeClient(HERE | {"torch": "2.0.0"})), "python", Console())
    assert "warning: torch is" in capsys.readouterr().err


def test_a_cluster_is_asked_once_for_each_interpreter() -> None:
    client = FakeClient()
    server = server_of(client)
    for python, num_asked in (("python", 1), ("python", 1), ("/opt/py thon", 2)):
        assert cluster_versions(server, python, Console()) == HERE
        assert len(client.submitted) == num_asked
    assert client.submitted[-1]["entrypoint"].startswith("'/opt/py thon' -c ")
    first = client.submitted[0]["submission_id"]
    client.put(first, JobStatus.FAILED)  # as of an image that was not there yet
    assert cluster_versions(server, "python", Console()) == HERE
    assert client.submitted[-1]["submission_id"] == f"{first}-2"


def test_an_interpreter_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()

    def fail(*, submission_id: str, **_: object) -> str:
        client.put(submission_id, JobStatus.FAILED, driver_exit_code=127)
        return submission_id

    monkeypatch.setattr(client, "submit_job", fail)
    with pytest.raises(ConfigError, match=r"cannot run 'python9' .* --python"):
        cluster_versions(server_of(client), "python9", Console())


def test_a_silent_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    client = FakeClient()
    monkeypatch.setattr(client, "get_job_logs", lambda submission_id: f"Running entrypoint {PROBE}")
    with pytest.raises(RuntimeError, match="has not told its versions"):
        cluster_versions(server_of(client), "python", Console())


def test_the_probe_tells_what_is_installed() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.removeprefix(MARK)) == HERE
