"""Every named config builds, round-trips and dry-runs; mistakes get one clear message."""

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.config import JobConfig
from pipelines.experiments.catalog import CONFIGS, load_config
from userrep.config import ConfigError


@pytest.mark.parametrize("name", CONFIGS)
def test_named_config_round_trips_through_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name, None, [])
    shown = CliRunner().invoke(app, ["show-config", "--config", name]).stdout
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    assert load_config(str(path), None, []) == config
    assert config.name == name
    assert config.content_hash() == JobConfig.parse(yaml.safe_load(shown)).content_hash()


@pytest.mark.parametrize("name", CONFIGS)
def test_named_config_dry_runs(name: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", "--config", name, "--workdir", str(tmp_path / "w"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "would run" in result.stderr
    assert not (tmp_path / "w").exists()


def test_every_named_config_says_how_it_is_run() -> None:
    for name, build in CONFIGS.items():
        assert build.__doc__
        assert name == "parquet" or f"--config {name}" in build.__doc__


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pretrain.nmu_steps=3"], "unknown config key 'pretrain.nmu_steps'.*num_steps"),
        (["pretrain.num_steps=three"], r"pretrain.num_steps: .*received 'three'"),
        (["pretrain.num_steps=0"], "greater than or equal to 1"),
        (["pretrain"], "not of the form key.subkey=value"),
        (["pretrain.num_steps.x=1"], "none .it is a plain value"),
        (["workers.num_workers=3"], r"128 does not divide.*126 or 129 users, .* numbers of workers: 1, 2, 4$"),
        (["pretrain.views.kinds=[mixed]"], r"mixed.*training"),
    ],
)
def test_wrong_override_names_the_key(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("smoke", None, overrides)


def test_unknown_config_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"demo.*smoke.*yelp2019"):
        load_config("yelp", None, [])


def test_data_must_fit_the_source(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="generates its data"):
        load_config("demo", tmp_path, [])
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("yelp2019", tmp_path / "absent", [])
