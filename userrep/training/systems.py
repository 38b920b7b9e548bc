"""Every system that can be pretrained: `pretrain.system` in a config chooses one."""

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from userrep.config import Config
from userrep.training.clue_system import ClueSystem
from userrep.training.optim import build_optimizer
from userrep.training.recformer_system import RecformerSystem
from userrep.training.settings import CluePretraining, PretrainConfig, RecformerPretraining, TwoTowerPretraining
from userrep.training.state import TrainState
from userrep.training.system import System
from userrep.training.two_tower_system import TwoTowerSystem

AnyPretraining = Annotated[CluePretraining | RecformerPretraining | TwoTowerPretraining, Field(discriminator="system")]

_SYSTEMS: dict[type[PretrainConfig], Any] = {
    CluePretraining: ClueSystem,
    RecformerPretraining: RecformerSystem,
    TwoTowerPretraining: TwoTowerSystem,
}


class _Choice(Config):
    pretrain: AnyPretraining


def parse_pretraining(values: dict[str, Any]) -> CluePretraining | RecformerPretraining | TwoTowerPretraining:
    """The config of a run from its plain values.

    Raises:
        ConfigError: unknown system or key, or a value out of range.
    """
    return _Choice.parse({"pretrain": values}).pretrain


def open_system(config: PretrainConfig, shards: Path) -> System:
    """The system of a run, on tokenized shards.

    Raises:
        ConfigError: the shards lack what the system reads.
    """
    return _SYSTEMS[type(config)](config, shards)


def build_state(config: PretrainConfig, shards: Path) -> TrainState[Any]:
    """A freshly initialised model and optimizer; the same numbers in every process for the same seed."""
    torch.manual_seed(config.seed)
    model = open_system(config, shards).build_model()
    return TrainState(model=model, optimizer=build_optimizer(model, config.optim), seed=config.seed)
