"""The complete config of the main job."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from userrep.config import Config, ConfigError
from userrep.data.ingest import IngestConfig
from userrep.data.sources.catalog import SourceConfig
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.tokenizer import TokenizeConfig
from userrep.training.settings import PretrainConfig, WorkersConfig, check_batch_divides


class EvaluateConfig(Config):
    """Retrieval on held-out users, against baselines."""

    pool_size: int = Field(default=1000, ge=2)  # test users; fewer when the split has fewer
    bag_of_tokens_steps: int = Field(default=1500, ge=0)  # about a minute on 2 cores at 512 users per step
    bag_of_tokens_dim: int = Field(default=128, ge=1)
    without_blocks: bool = True  # also train the encoder without its transformer blocks, as long as the encoder
    num_idf_histories: int = Field(
        default=50_000, ge=1
    )  # training histories from which document frequencies are counted


class EmbedConfig(Config):
    """The published table."""

    dtype: Literal["float32", "float16"] = "float32"


class PublishConfig(Config):
    """Name under which the table is found."""

    name: str = Field(default="user_embeddings", pattern=r"^[A-Za-z0-9_-]{1,100}$")
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]{1,100}$")
    experiment: str = "userrep"


class JobConfig(Config):
    """Everything that `userrep run` does, stage by stage."""

    name: str = "userrep"
    source: SourceConfig = SyntheticSource()
    ingest: IngestConfig = IngestConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    pretrain: PretrainConfig = PretrainConfig()
    workers: WorkersConfig = WorkersConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    embed: EmbedConfig = EmbedConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        check_batch_divides(self.pretrain, self.workers)
        return self

    def with_data(self, path: Path) -> Self:
        """Points the source to a path on this machine.

        Raises:
            ConfigError: the source takes no path, or the path does not exist.
        """
        if "path" not in type(self.source).model_fields:
            raise ConfigError(
                f"--data is given, but source {self.source.kind!r} generates its data: use another --config"
            )
        if not path.exists():
            raise ConfigError(f"--data {path} does not exist")
        return self.with_overrides([f"source.path={path.resolve()}"])
