"""Finds configs by name or file. A named config is a function without arguments in one of this folder's modules."""

from collections.abc import Callable
from pathlib import Path

import yaml

from pipelines.config import JobConfig
from pipelines.experiments import public, synthetic
from userrep.config import ConfigError

CONFIGS: dict[str, Callable[[], JobConfig]] = {
    function.__name__: function
    for function in (synthetic.demo, synthetic.smoke, public.yelp2019, public.amazon2014, public.ml1m, public.parquet)
}


def load_config(name_or_file: str, data: Path | None, overrides: list[str]) -> JobConfig:
    """Resolves `--config`, `--data` and `--set`.

    Raises:
        ConfigError: unknown name, unreadable file, unknown key, or a value out of range.
    """
    path = Path(name_or_file)
    if name_or_file in CONFIGS:
        config = CONFIGS[name_or_file]()
    elif path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping of config keys; `userrep show-config` prints one to start from")
        config = JobConfig.parse(values)
    else:
        raise ConfigError(
            f"--config {name_or_file!r} is neither a name ({', '.join(CONFIGS)}) nor an existing .yaml or .json file"
        )
    if data is not None:
        config = config.with_data(data)
    return config.with_overrides(overrides)


def describe_configs() -> dict[str, str]:
    """First line of each named config's docstring."""
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in CONFIGS.items()}
