"""Which commands are the same job, and what is refused before anything is sent."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.submit_command import STAGES, StageCommand, parse_command
from userrep.config import ConfigError

SHARED = ("--workdir", "/mnt/shared/a")


def parse(*words: str) -> StageCommand:
    return parse_command(words)


def test_the_same_meaning_is_the_same_job() -> None:
    plain = parse("run", "--config", "smoke", *SHARED)
    assert plain.stage == "run"
    assert plain.workdir == "/mnt/shared/a"
    assert plain.words == ("run", "--config", "smoke", *SHARED)
    for same in (
        ("run", "-c", "smoke", "-w", "/mnt/shared/a"),
        ("run", *SHARED, "--config=smoke", "--verbose"),
        ("run", *SHARED, "-c", "smoke", "--set", "pretrain.num_steps=20"),  # the default of this config
    ):
        assert parse(*same).digest == plain.digest
    others = [
        ("pretrain", "--config", "smoke", *SHARED),
        ("run", "--config", "smoke", "--workdir", "/mnt/shared/b"),
        ("run", "--config", "demo", *SHARED),
        ("run", "--config", "smoke", *SHARED, "--set", "pretrain.num_steps=21"),
        ("run", "--config", "ml1m", "--data", "/mnt/ml1m", *SHARED),
        ("run", "--config", "ml1m", "--data", "/mnt/other", *SHARED),
        ("sweep", "run", "--config", "sweep_smoke", *SHARED),
        ("sweep", "run", "--config", "sweep_smoke", *SHARED, "--retry-failed"),
        ("continual", "--config", "smoke", *SHARED),
        ("continual", "--config", "smoke", *SHARED, "--seeds", "0,1"),
        ("finetune", "--from", "/mnt/encoder", *SHARED),
        ("finetune", "--from", "/mnt/encoder", *SHARED, "--set", "finetune.frozen=null"),
    ]
    assert len({plain.digest, *(parse(*words).digest for words in others)}) == len(others) + 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_command_of_a_job_can_be_submitted(stage: str) -> None:
    config = {"sweep run": "sweep_smoke", "finetune": "parquet"}.get(stage, "smoke")
    extra = ("--from", "/mnt/encoder") if stage == "finetune" else ()
    command = parse(*stage.split(), "--config", config, *SHARED, *extra)
    assert command.words[: len(stage.split())] == tuple(stage.split())


def test_a_config_file_goes_along(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\n")
    for words in (("--config", str(file)), (f"--config={file}",), ("-c", str(file)), (f"-c{file}",)):
        command = parse("run", *SHARED, *words, "--set", "pretrain.seed=1")
        assert command.sent == {"submitted_config.yaml": b"name: mine\n"}
        assert command.words == ("run", "--config", "submitted_config.yaml", *SHARED, "--set", "pretrain.seed=1")
    before = command.digest
    file.write_text("{name: mine}\n")
    assert parse("run", *SHARED, "-c", str(file), "--set", "pretrain.seed=1").digest == before
    file.write_text("name: other\n")
    assert parse("run", *SHARED, "-c", str(file), "--set", "pretrain.seed=1").digest != before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("pull", "users@champion"), "is no command of a job"),
        (("sweep", "plan", "--config", "sweep_smoke"), "'sweep plan' is no command of a job"),
        (("run", "--config", "smoke"), "workdir is 'jobs'"),
        (("run", "--config", "ml1m", "--data", "raw", *SHARED), "data is 'raw'"),
        (("finetune", "--from", "jobs/text/encoder", *SHARED), "source is 'jobs/text/encoder'"),
        (("run", "--config", "nothing", *SHARED), "neither a name"),
        (("run", "--config", "smoke", *SHARED, "--set", "a=1"), "unknown config key 'a'"),
        (("continual", "--config", "smoke", *SHARED, "--tracking-uri", "http://u:s3cret@h"), "URI with credentials"),
    ],
)
def test_what_cannot_run_there_is_refused(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        parse(*words)
    assert "s3cret" not in str(refused.value)


def test_relative_paths_in_a_config_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs" / "other").mkdir(parents=True)
    (tmp_path / "userrep").mkdir()  # like the name of the experiment
    file = tmp_path / "mine.yaml"
    mix = "pretrain.mix=[{shards: jobs/other, weight: 0.5}]"
    with pytest.raises(ConfigError, match="'jobs/other' relative to this directory"):
        parse("run", "-c", "smoke", *SHARED, "--set", mix)
    parse(
        "run", "-c", "smoke", *SHARED, "--set", mix.replace("jobs", "/mnt/jobs"), "--set", "publish.experiment=userrep"
    )
    file.write_text("tokenize: {name: jobs/other}\n")
    with pytest.raises(ConfigError, match="'jobs/other' relative to this directory"):
        parse("run", "-c", "mine.yaml", *SHARED)
    file.write_text("tokenize: {name: org/model}\n")  # of the hub
    parse("run", "-c", "mine.yaml", *SHARED)


def test_an_option_that_the_command_does_not_have_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["submit", "run", *SHARED, "--address", "http://127.0.0.1:1", "--steps", "3"])
    assert result.exit_code == 2
    assert "--steps" in result.output
