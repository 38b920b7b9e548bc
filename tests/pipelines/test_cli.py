"""The command line: one clear message for a mistake, a diagnosis that names what to do."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines import doctor
from pipelines.cli import app, main


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["userrep", *arguments])
    main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--config", "nothing"), "neither a name"),
        (("show-config", "--set", "a=1"), "unknown config key 'a'"),
        (("pull", "users@champion", "--tracking-uri", "sqlite:///relative.db"), "relative"),
        (("pull", "no reference at all", "--tracking-uri", "sqlite:////nowhere/x.db"), "NAME|name"),
    ],
)
def test_mistake_ends_with_one_message(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, *arguments)
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("userrep: ")
    assert any(part in error for part in message.split("|"))
    assert "Traceback" not in error


def test_help_names_every_command() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    for command in (
        "ingest",
        "tokenize",
        "pretrain",
        "evaluate",
        "embed",
        "publish",
        "pull",
        "tables",
        "run",
        "finetune",
        "show-config",
        "sync-tracking",
        "chaos",
        "doctor",
        "submit",
        "jobs",
    ):
        assert command in text


def test_doctor_finds_a_healthy_machine_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    findings = {finding.what: finding for finding in doctor.diagnose(tmp_path / "new" / "work", None)}
    assert findings["torch"].level == findings["storage"].level == "OK"
    assert findings["cores"].level in ("OK", "FAIL")
    assert not (tmp_path / "new").exists()


def test_doctor_names_an_unreachable_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = CliRunner().invoke(
        app, ["doctor", "--workdir", str(tmp_path), "--tracking-uri", f"sqlite:///{tmp_path}/absent.db"]
    )
    assert result.exit_code == 1
    assert "FAIL  mlflow" in result.stdout
