"""Settings of a pretraining run, and of where it is executed."""

import math
from pathlib import Path
from typing import Literal, Self, TypeVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from userrep import table_versions
from userrep.config import Config, ConfigError
from userrep.data.augment import AugmentConfig
from userrep.data.stream import TrainingStream, open_stream, read_shard_sets
from userrep.data.views import ViewConfig
from userrep.mirror import locate
from userrep.models.clue import ClueConfig
from userrep.models.recformer import RecformerConfig
from userrep.models.two_tower import TwoTowerConfig
from userrep.training.encoding import MemoryConfig
from userrep.training.fence import STORAGE_PATIENCE_S
from userrep.training.objective import LossConfig, Precision
from userrep.training.optim import OptimConfig
from userrep.training.recformer_objective import RecformerLossConfig
from userrep.training.two_tower_objective import TwoTowerLossConfig


class MixConfig(Config):
    """Another job's tokenized shards, whose training samples are mixed into the run."""

    shards: Path  # on storage that all nodes share, or s3://; a relative path starts where the command is issued
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)  # samples per sample of the job's own shards

    @field_validator("shards")
    @classmethod
    def _workers_start_elsewhere(cls, path: Path) -> Path:
        return locate(path)


class PretrainConfig(Config):
    """One pretraining run: what all systems have in common. `system` says which one it is."""

    views: ViewConfig = ViewConfig()
    augment: AugmentConfig = AugmentConfig()
    mix: tuple[MixConfig, ...] = ()  # validation users and document frequencies are those of the job's own shards
    optim: OptimConfig = OptimConfig()
    global_batch_size: int = Field(default=512, ge=2)  # users per optimizer step, over all workers
    num_steps: int = Field(default=300, ge=1)
    # Of the training samples; smaller shares are parts of larger ones. A sweep over data sizes sets it.
    user_share: float = Field(default=1.0, gt=0, le=1)
    validate_every: int = Field(default=50, ge=1)  # steps between validations, each of which saves a checkpoint
    pool_size: int = Field(default=1000, ge=2)  # held-out users of a validation
    keep_checkpoints: int = Field(default=2, ge=1)  # newest ones; the best one is kept as well
    precision: Precision = "float32"  # of the encoder's matrix products; weights and loss are float32
    seed: int = 0

    @model_validator(mode="after")
    def _views_suit_their_use(self) -> Self:
        if "mixed" in self.views.kinds and (self.views.kinds[0] == "mixed" or self.augment.cut != "random"):
            raise ValueError(
                "`mixed` views are for training: put another kind first in views.kinds, set augment.cut=random"
            )
        return self


class CluePretraining(PretrainConfig):
    """CLUE: two views of a user attract (`models/clue.py`)."""

    system: Literal["clue"] = "clue"
    model: ClueConfig = ClueConfig()
    loss: LossConfig = LossConfig()


NEXT_ITEM = ViewConfig(kinds=("next_item",), max_events=50)


class RecformerPretraining(PretrainConfig):
    """Recformer: the next item attracts the text of a history, and masked words are guessed (`models/recformer.py`).

    Shards need keys: `source.keep_attributes=true` and `tokenize.attributes={}`.
    """

    system: Literal["recformer"] = "recformer"
    model: RecformerConfig = RecformerConfig()
    # Longformer, RoBERTa or BERT to start from: a local path or a name of the hub. `model` then says what of a history
    # is read; the shape is the backbone's, and so must be the tokenizer (`tokenize.name`).
    backbone: str | None = None
    loss: RecformerLossConfig = RecformerLossConfig()
    views: ViewConfig = NEXT_ITEM
    augment: AugmentConfig = AugmentConfig(max_events=50, targets="later_half")
    optim: OptimConfig = OptimConfig(learning_rate=5e-4, embedding_learning_rate=1e-3)
    global_batch_size: int = Field(default=64, ge=2)

    @model_validator(mode="after")
    def _reads_next_items(self) -> Self:
        return check_next_items(self)


class TwoTowerPretraining(PretrainConfig):
    """Two towers: the next item attracts the last one, and two views of an item attract (`models/two_tower.py`).

    Shards need features: `source.keep_attributes=true` and `tokenize.features`.
    """

    system: Literal["two_tower"] = "two_tower"
    model: TwoTowerConfig = TwoTowerConfig(hidden_dims=(256, 64))
    loss: TwoTowerLossConfig = TwoTowerLossConfig()
    views: ViewConfig = ViewConfig(kinds=("next_item",), max_events=1)
    augment: AugmentConfig = AugmentConfig(max_events=1)
    optim: OptimConfig = OptimConfig(algorithm="adagrad", learning_rate=0.01, embedding_learning_rate=0.01)

    @model_validator(mode="after")
    def _reads_next_items(self) -> Self:
        return check_next_items(self)


P = TypeVar("P", bound=PretrainConfig)


def check_next_items(config: P) -> P:
    """Refuses views that are no history and its next item.

    Raises:
        ValueError: says which.
    """
    if config.views.kinds != ("next_item",):
        raise ValueError(f"views.kinds={list(config.views.kinds)}: this system learns from [next_item] alone")
    return config


class WorkersConfig(Config):
    """Where a run is executed. No part of a run's identity: the result does not depend on it."""

    # (fewest, most): as many as the cluster has room for, also while the run goes on; they divide the same batches.
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    threads: int = Field(default=0, ge=0)  # torch threads of a worker; 0 = the machine's cores over the workers
    use_gpu: bool = False
    memory: MemoryConfig = MemoryConfig()
    max_failures: int = Field(default=3, ge=-1)  # attempts in a row that may fail before a new checkpoint; -1: any
    # Seconds after which a worker that does not answer, that others wait for in a step, or that waits for its next
    # batch counts as lost; ten times its longest step, where that is longer.
    timeout_s: int = Field(default=20, ge=math.ceil(STORAGE_PATIENCE_S) + 1)

    @model_validator(mode="after")
    def _fewest_come_first(self) -> Self:
        if self.bounds[0] > self.bounds[1]:
            raise ValueError(f"num_workers={self.num_workers}: give the fewest first, then the most")
        return self

    @property
    def bounds(self) -> tuple[int, int]:
        """The fewest and the most workers that there may be."""
        return self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)


def open_training_stream(shards: Path, config: PretrainConfig, num_steps: int | None = None) -> TrainingStream:
    """The batches of a run, over the job's own shards and those that are mixed into it.

    Args:
        shards: the job's own.
        config: the run.
        num_steps: length in optimizer steps; default: the run's.

    Raises:
        ConfigError: the samples are too few for the batch, or shards were made with different tokenizers.
        IncompleteTableError: a directory holds no committed shards.
    """
    try:
        return open_stream(
            read_shard_sets(
                [(shards, 1.0), *((table_versions.open_table(other.shards), other.weight) for other in config.mix)]
            ),
            config.views,
            config.augment,
            config.global_batch_size,
            config.seed,
            num_steps or config.num_steps,
            config.user_share,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def check_batch_divides(config: PretrainConfig, workers: WorkersConfig) -> None:
    """Refuses a global batch that cannot be dealt, before anything starts.

    A fixed number of workers must divide it; where their number varies, parts may differ by one.

    Raises:
        ConfigError: with the batch sizes and numbers of workers that would work.
    """
    size, count = config.global_batch_size, workers.bounds[1]
    if isinstance(workers.num_workers, tuple):
        if size < count:
            raise ConfigError(
                f"pretrain.global_batch_size={size} is too small for up to {count} workers (workers.num_workers): "
                f"use a batch of at least {count} users, or at most {size} workers"
            )
    elif size % count:
        sizes = " or ".join(str(n * count) for n in (size // count, size // count + 1) if n * count >= 2)
        counts = ", ".join(str(n) for n in range(1, 2 * count + 1) if size % n == 0)
        raise ConfigError(
            f"pretrain.global_batch_size={size} does not divide over workers.num_workers={count}: "
            f"use a batch of {sizes} users, or one of these numbers of workers: {counts}"
        )
