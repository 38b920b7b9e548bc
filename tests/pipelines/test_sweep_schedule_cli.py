"""The command: what it prints is what it writes, and a mistake is named."""

from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from pipelines.sweep_schedule_cli import schedule

app = typer.Typer()
app.command("schedule")(schedule)

WEEKLY = ["--cron", "0 3 * * mon", "--config", "weekly"]
PODS = ["--workdir", "/mnt/userrep/s", "--cluster", "image=ours:1", "--cluster", "claim=userrep"]


def test_crontab_has_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("")
    done = CliRunner().invoke(app, ["--cron", "0 3 * * mon", "-c", "mine.yaml", "-w", "sweeps", "-d", "raw/{date}"])
    assert done.exit_code == 0, done.output
    for path in ("mine.yaml", "sweeps", "raw/{date}"):
        assert f'"{tmp_path / path}"' in done.stdout


@pytest.mark.parametrize("kind", ["CronJob", "RayCronJob"])
def test_manifests_are_written_as_they_are_printed(tmp_path: Path, kind: str) -> None:
    options = [*WEEKLY, *PODS, "--target", kind, "--cluster", "worker.gpus=1", "--suspend"]
    printed = CliRunner().invoke(app, options).stdout
    assert CliRunner().invoke(app, [*options, "--out", str(tmp_path / "k8s")]).stdout == ""
    (path,) = (tmp_path / "k8s").iterdir()
    assert path.read_text() == printed
    (timing,) = [document["spec"] for document in yaml.safe_load_all(printed) if document["kind"] == kind]
    assert timing["suspend"] is True
    assert "nvidia.com/gpu" in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "image"], "not of the form key=value"),
        (["--cluster", "image.tag=1"], "'image' already has a value"),
        (["--cluster", "imagee=1"], "imagee"),
        (["--tracking-uri", "http://me:pw@mlflow"], "holds credentials"),
    ],
)
def test_mistakes_are_named(options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, [*WEEKLY, *PODS, "--target", "CronJob", *options])
    assert isinstance(done.exception, ValueError)
    assert message in str(done.exception)
