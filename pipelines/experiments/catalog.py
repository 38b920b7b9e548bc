"""Finds configs by name or file. A named config is a function without arguments in one of this folder's modules."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import yaml

from pipelines.config import JobConfig
from pipelines.continual_config import ContinualJobConfig
from pipelines.experiments import continual, next_item, public, sweeps, synthetic
from pipelines.sweep_config import SweepConfig
from userrep.config import Config, ConfigError
from userrep.training.cells import Cell

CONFIGS: dict[str, Callable[[], JobConfig]] = {
    function.__name__: function
    for function in (
        synthetic.demo,
        synthetic.smoke,
        public.yelp2019,
        public.amazon2014,
        public.ml1m,
        public.parquet,
        next_item.recformer_smoke,
        next_item.two_tower_smoke,
        next_item.recformer_amazon2014,
        next_item.recformer_amazon2018,
        next_item.two_tower_amazon2014,
        next_item.two_tower_yelp2019,
    )
}


CONTINUAL_CONFIGS: dict[str, Callable[[], ContinualJobConfig]] = {
    function.__name__: function
    for function in (continual.smoke, continual.synthetic, continual.ml1m, continual.ml1m_sampling)
}


SWEEP_CONFIGS: dict[str, Callable[[], SweepConfig]] = {
    function.__name__: function
    for function in (
        sweeps.sweep_smoke,
        sweeps.sweep_synthetic,
        sweeps.sweep_amazon2014,
        sweeps.rates_synthetic,
        sweeps.rates_amazon2014,
    )
}


def load_config(name_or_file: str, data: Path | None, overrides: list[str]) -> JobConfig:
    """Resolves `--config`, `--data` and `--set`.

    Raises:
        ConfigError: unknown name, unreadable file, unknown key, or a value out of range.
    """
    config = _find(name_or_file, CONFIGS, JobConfig)
    if data is not None:
        config = config.with_data(data)
    return config.with_overrides(overrides)


def load_continual_config(
    name_or_file: str,
    data: Path | None,
    overrides: list[str],
    methods: str,
    orders: list[str],
    seeds: str,
    model: Cell | None = None,
) -> ContinualJobConfig:
    """Resolves the options of `userrep continual`; what is given in words replaces what the config says.

    Args:
        name_or_file: a named config or a file.
        data: path of the raw data.
        overrides: of `--set`.
        methods: comma-separated names; empty: those of the config.
        orders: each comma-separated names of tasks.
        seeds: comma-separated numbers.
        model: that is gone on with: what the config says of method, options, seed, training and orders yields to it.

    Raises:
        ConfigError: as `load_config`.
    """
    config = _find(name_or_file, CONTINUAL_CONFIGS, ContinualJobConfig)
    if model is not None:
        config = config.with_settings_of(model)
    words = [f"tasks.source.path={data.resolve()}"] if data is not None else []
    if methods and (model is None or methods.strip() != model.method):  # its name alone says nothing of its options
        words.append(f"methods=[{', '.join(f'{{name: {name.strip()}}}' for name in methods.split(','))}]")
    if orders:
        words.append(f"orders=[{', '.join(f'[{order}]' for order in orders)}]")
    if seeds:
        words.append(f"seeds=[{seeds}]")
    return config.with_overrides([*words, *overrides])


def load_sweep_config(name_or_file: str, data: Path | None, overrides: list[str]) -> SweepConfig:
    """Resolves the options of `userrep sweep`.

    Raises:
        ConfigError: as `load_config`.
    """
    config = _find(name_or_file, SWEEP_CONFIGS, SweepConfig)
    if data is not None:
        config = config.model_copy(update={"job": config.job.with_data(data)})
    return config.with_overrides(overrides)


C = TypeVar("C", bound=Config)


def _find(name_or_file: str, known: dict[str, Callable[[], C]], config_class: type[C]) -> C:
    path = Path(name_or_file)
    if name_or_file in known:
        return known[name_or_file]()
    if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
        values = yaml.safe_load(path.read_text())
        if not isinstance(values, dict):
            raise ConfigError(f"{path} holds no mapping of config keys; `userrep show-config` prints one to start from")
        return config_class.parse(values)
    raise ConfigError(
        f"--config {name_or_file!r} is neither a name ({', '.join(known)}) nor an existing .yaml or .json file"
    )


def describe_configs() -> dict[str, str]:
    """First line of each named config's docstring."""
    return {name: (function.__doc__ or "").strip().splitlines()[0] for name, function in CONFIGS.items()}
