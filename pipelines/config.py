"""The complete config of the main job."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from pipelines.continual_config import NOISE, MethodChoice
from userrep import storage
from userrep.config import Config, ConfigError
from userrep.continual.catalog import METHODS
from userrep.data.ingest import IngestConfig
from userrep.data.shard_tasks import FIRST_TASK, Question, name_of
from userrep.data.sources.catalog import SourceConfig
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.tokenizer import TokenizeConfig
from userrep.mirror import object_name, shown
from userrep.publishing.gate import GateConfig
from userrep.schema import task_column
from userrep.training.cells import TaskTraining
from userrep.training.settings import CluePretraining, WorkersConfig, check_batch_divides
from userrep.training.systems import AnyPretraining


class EvaluateConfig(Config):
    """Retrieval on held-out users, against baselines."""

    pool_size: int = Field(default=1000, ge=2)  # test users; fewer when the split has fewer
    bag_of_tokens_steps: int = Field(default=1500, ge=0)  # about a minute on 2 cores at 512 users per step
    bag_of_tokens_dim: int = Field(default=128, ge=1)
    without_blocks: bool = True  # also train the encoder without its transformer blocks, as long as the encoder
    num_idf_histories: int = Field(
        default=50_000, ge=1
    )  # training histories from which document frequencies are counted


class TeachConfig(Config):
    """Tasks that the encoder is taught after pretraining, in this order; none: it stays as pretrained."""

    questions: tuple[Question, ...] = ()
    # All users of a batch rehearse, since item vectors are there already, and much: with TERACON's own weight, .7, the
    # published vector lost a quarter of its recall, and the tasks were learned no better (pipelines/records/LOG.md).
    method: MethodChoice = MethodChoice(name="teracon", options={"sampling": "all", "retention_weight": 30.0})
    training: TaskTraining = TaskTraining(batch_size=128, learning_rate=1e-3, max_epochs=30)
    max_items: int = Field(default=32, ge=2)  # most recent events that a task sees of a user, of all services
    max_users: PositiveInt = 200_000  # whose events and labels are read; they are in memory
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _can_be_taught(self) -> Self:
        names = [name_of(question) for question in self.questions]
        if len({*names, FIRST_TASK, NOISE}) < len(names) + 2:
            reserved = f"{FIRST_TASK!r} or {NOISE!r}"
            raise ValueError(f"questions {names} have a name twice, or {reserved}: give one of them a `name`")
        for name in names:
            task_column(name)  # raises where the name cannot be that of a column
        if not METHODS[self.method.name].method.takes_pretrained:
            raise ValueError(f"method {self.method.name} cannot go on from a pretrained encoder: take another one")
        return self


class EmbedConfig(Config):
    """The published table."""

    dtype: Literal["float32", "float16", "int8"] = "float32"
    # What ids are of: tables are joined and compared if they name the same. Empty: the name of the config.
    id_space: str = Field(default="", max_length=100)


class PublishConfig(Config):
    """Name under which the table is found."""

    name: str = Field(default="user_embeddings", pattern=r"^[A-Za-z0-9_-]{1,100}$")
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]{1,100}$")
    experiment: str = "userrep"
    gate: GateConfig = GateConfig()  # what a version must hold against the one that the alias points to


class JobConfig(Config):
    """Everything that `userrep run` does, stage by stage."""

    name: str = "userrep"
    source: SourceConfig = SyntheticSource()
    ingest: IngestConfig = IngestConfig()
    tokenize: TokenizeConfig = TokenizeConfig()
    pretrain: AnyPretraining = CluePretraining()
    workers: WorkersConfig = WorkersConfig()
    teach: TeachConfig = TeachConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    embed: EmbedConfig = EmbedConfig()
    publish: PublishConfig = PublishConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_batch_divides(self.pretrain, self.workers)
        if self.teach.questions:
            _ = self.clue
        return self

    @property
    def clue(self) -> CluePretraining:
        """The pretraining of CLUE.

        Raises:
            ConfigError: the job pretrains another system.
        """
        if not isinstance(self.pretrain, CluePretraining):
            raise ConfigError(
                f"pretrain.system={self.pretrain.system}: this is for CLUE alone, set pretrain.system=clue"
            )
        return self.pretrain

    def with_data(self, path: Path) -> Self:
        """Points the source to a path on this machine.

        Raises:
            ConfigError: the source takes no path, or the path does not exist.
        """
        if "path" not in type(self.source).model_fields:
            raise ConfigError(
                f"--data is given, but source {self.source.kind!r} generates its data: use another --config"
            )
        storage.receive(path, "*")
        if not path.exists() or (object_name(path) is not None and not any(path.iterdir())):
            raise ConfigError(f"--data {shown(path)} does not exist")
        return self.with_overrides([f"source.path={path.resolve()}"])
