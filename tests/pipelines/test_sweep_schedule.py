"""The line of a crontab: run through cron's rule for % and through sh, with paths that nobody should choose."""

import fcntl
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.sweep_recurring import RecurringSweep
from pipelines.sweep_schedule import LOCK, LOG, ScheduleConfig, escape_cron, render_crontab

HARD_NAME = "a b%c'd$HOME`e`\"f;g&(h)%%"


def schedule_of(root: Path | str = "/sweeps", **values: Any) -> ScheduleConfig:
    sweep = {"config": "weekly", "root": str(root), **values.pop("sweep", {})}
    return ScheduleConfig.parse({"cron": "0 3 * * mon", "sweep": sweep, **values})


def unescape(command: str) -> str:
    r"""What cron gives to the shell: `\%` is %, and a bare % would end the command."""
    plain = command.replace(r"\%", "\0")
    assert "%" not in plain
    return plain.replace("\0", "%")


def command_of(crontab: str) -> str:
    (line,) = [line for line in crontab.splitlines() if not line.startswith("#")]
    assert line.startswith("0 3 * * mon ")
    return unescape(line.removeprefix("0 3 * * mon "))


def fake_python(directory: Path, status: int = 0) -> str:
    """An interpreter that writes down its arguments and the tracking server, a line each."""
    path = directory / "pyt%hon x"
    seen = shlex.quote(str(directory / "seen"))
    path.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$MLFLOW_TRACKING_URI" "$TOKEN" > {seen}\nexit {status}\n')
    path.chmod(0o755)
    return str(path)


def run_shell(command: str) -> subprocess.CompletedProcess[str]:
    subprocess.run(["sh", "-n", "-c", command], check=True)
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})


def test_the_line_runs_what_was_asked(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets 100%"
    secrets.write_text("TOKEN=from-file\n")
    root = tmp_path / HARD_NAME
    schedule = schedule_of(root, mlflow_uri="http://mlflow:5000/?a=%20", sweep={"overrides": ["a.b='x y'", "c=5%"]})
    text = render_crontab(schedule, fake_python(tmp_path), str(secrets))
    assert "from-file" not in text
    done = run_shell(command_of(text))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    module, name, request, uri, token = (tmp_path / "seen").read_text().splitlines()
    assert (module, name) == ("-m", "pipelines.sweep_recurring")
    assert RecurringSweep.model_validate_json(request) == schedule.sweep
    assert (uri, token) == ("http://mlflow:5000/?a=%20", "from-file")
    assert (root / LOG).is_file()


def test_a_start_while_the_last_one_runs_does_nothing_and_says_so(tmp_path: Path) -> None:
    root = tmp_path / "sweeps"
    root.mkdir()
    command = command_of(render_crontab(schedule_of(root), fake_python(tmp_path)))
    with (root / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "status 75 (75: the last one still runs)" in run_shell(command).stdout
        assert not (tmp_path / "seen").exists()
    assert run_shell(command).stdout == ""
    assert (tmp_path / "seen").exists()


def test_a_failure_is_mailed_with_the_log(tmp_path: Path) -> None:
    root = tmp_path / HARD_NAME
    done = run_shell(command_of(render_crontab(schedule_of(root), fake_python(tmp_path, status=3))))
    assert "status 3" in done.stdout
    assert str(root / LOG) in done.stdout


def test_a_missing_env_file_stops_the_start(tmp_path: Path) -> None:
    text = render_crontab(schedule_of(tmp_path / "s"), fake_python(tmp_path), str(tmp_path / "absent"))
    run_shell(command_of(text))
    assert not (tmp_path / "seen").exists()


@given(words=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1), min_size=1))
def test_quoting_survives_cron_and_shell(words: list[str]) -> None:
    command = shlex.join(words)
    if "\\%" in command:
        with pytest.raises(ValueError, match="backslash before a %"):
            escape_cron(command)
    else:
        assert shlex.split(unescape(escape_cron(command))) == words


def test_suspended_has_no_line_that_cron_reads() -> None:
    lines = render_crontab(schedule_of(suspend=True), "/usr/bin/python3").splitlines()
    assert all(line.startswith("#") for line in lines)
    assert any("0 3 * * mon" in line for line in lines)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cron": "0 */6 * * *"}, "fires 4 times a day; a run is named by its date"),
        ({"cron": "0 3 * *"}, "has 4 fields"),
        ({"name": "Weekly_1"}, "name"),
        ({"name": "a" * 41}, "at most 40 characters"),
        ({"sweep": {"overrides": ["a=1\n* * * * * rm"]}}, "control character or a line break"),
        ({"sweep": {"config": "a\x00b"}}, "control character"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_of(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"mlflow_uri": "https://me:hunter2@mlflow.example"},
        {"mlflow_uri": "postgresql+psycopg://hunter2@db/mlflow"},
        {"sweep": {"overrides": ["source.url=https://me:hunter2@data.example/x"]}},
        {"sweep": {"data": "https://hunter2@data.example/x"}},
    ],
)
def test_credentials_are_refused_and_not_repeated(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="holds credentials") as caught:
        schedule_of(**values)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("python", "env_file"), [("python3", None), ("/usr/bin/python3", "secrets")])
def test_relative_paths_are_refused(python: str, env_file: str | None) -> None:
    with pytest.raises(ValueError, match="give an absolute one"):
        render_crontab(schedule_of(), python, env_file)


def test_schedule_survives_json() -> None:
    schedule = schedule_of(HARD_NAME.join(["/", "/x"]), sweep={"overrides": ["a=1"], "max_hours": 1.5})
    assert ScheduleConfig.parse(json.loads(schedule.model_dump_json())) == schedule
