"""The complete config of an experiment with continual tasks, and the cells that it stands for."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from userrep.config import Config, ConfigError, digest_json
from userrep.continual.catalog import METHODS
from userrep.data.shard_tasks import FIRST_TASK, Question, name_of, shard_tasks
from userrep.data.sources.movielens import MovieLensSource
from userrep.data.sources.parquet import ParquetSource
from userrep.data.sources.synthetic import SyntheticSource
from userrep.data.task_digests import digest_tasks
from userrep.data.task_sources import ml1m_tasks, synthetic_tasks
from userrep.data.tasks import TaskSet, TaskSplit, noisy_task, vector_task
from userrep.data.ttl import TtlTask, ttl_tasks
from userrep.training.cells import Cell, ContinualConfig

NOISE = "noise"  # name of the task that nothing can be learned from


class Ml1mTasks(Config):
    """Six tasks of MovieLens 1M: the next movie, a 4-star and a 5-star movie, gender, age and occupation."""

    kind: Literal["ml1m"] = "ml1m"
    source: Annotated[ParquetSource | MovieLensSource, Field(discriminator="kind")]
    max_items: int = Field(default=30, ge=2)  # most recent ones that are seen of a user
    # 4-star and 5-star movies of a user that are asked for, the most recent ones; None: all. All targets of a user have
    # one input and so one ranking, in which they compete: with all of them (57 and 36 a user) no method could have a
    # higher MRR@5 than .040 and .063; the published data have about one.
    max_targets: PositiveInt | None = 5

    def build(self, split: TaskSplit) -> TaskSet:
        """Reads the source."""
        return ml1m_tasks(self.source, split, self.max_items, self.max_targets)


class SyntheticTasks(Config):
    """Six tasks of the built-in world: next search, product, topic, department, gender and age."""

    kind: Literal["synthetic"] = "synthetic"
    source: SyntheticSource = SyntheticSource(num_users=2000)
    max_items: int = Field(default=30, ge=2)
    max_targets: PositiveInt = 5  # products of a user that are asked for

    def build(self, split: TaskSplit) -> TaskSet:
        """Draws the world."""
        return synthetic_tasks(self.source, split, self.max_items, self.max_targets)


class TtlFile(Config):
    """A task after the first one, and its file."""

    name: str
    kind: Literal["item", "label"]
    path: Path


class TtlTasks(Config):
    """Files in the format of the official code, e.g. of the TTL data set."""

    kind: Literal["ttl"] = "ttl"
    first: Path
    later: tuple[TtlFile, ...] = Field(min_length=1)

    def build(self, split: TaskSplit) -> TaskSet:
        """Reads the files."""
        return ttl_tasks(self.first, [TtlTask(task.name, task.kind, task.path) for task in self.later], split)


class ShardTasks(Config):
    """The task `universal`, and questions about the users of ingested shards, which have a split of their own."""

    kind: Literal["shards"] = "shards"
    path: Path  # the table `ingest` of a job
    questions: tuple[Question, ...] = Field(min_length=1)
    max_items: int = Field(default=32, ge=2)  # most recent ones that are seen of a user, of all services
    max_users: PositiveInt = 200_000  # that are read; they are in memory

    @model_validator(mode="after")
    def _names_nothing_twice(self) -> Self:
        names = [FIRST_TASK, NOISE, *(name_of(question) for question in self.questions)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"questions {names[2:]} have a name twice, or {FIRST_TASK!r} or {NOISE!r}: give one of them a `name`"
            )
        return self

    def build(self, split: TaskSplit) -> TaskSet:
        """Reads the shards; the split is theirs."""
        return shard_tasks(self.path, self.questions, self.max_items, self.max_users)


class MethodChoice(Config):
    """A method and the options that differ from its defaults."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.name not in METHODS:
            raise ValueError(f"unknown method {self.name!r}: use one of {', '.join(METHODS)}")
        METHODS[self.name].options.parse(self.options)
        return self


class ContinualWorkers(Config):
    """Where it runs. The cells are run one after another by the same workers."""

    num_workers: PositiveInt = 1
    threads: int = Field(default=0, ge=0)  # torch threads of a worker; 0 = the machine's cores over the workers
    use_gpu: bool = False
    max_failures: int = Field(default=3, ge=0)  # restarts of the workers; each goes on at the task that was interrupted


class ContinualJobConfig(Config):
    """Everything that `userrep continual` does."""

    name: str = "continual"
    tasks: Annotated[SyntheticTasks | Ml1mTasks | TtlTasks | ShardTasks, Field(discriminator="kind")] = SyntheticTasks()
    split: TaskSplit = TaskSplit()
    methods: tuple[MethodChoice, ...] = Field(default=tuple(MethodChoice(name=name) for name in METHODS), min_length=1)
    orders: tuple[tuple[str, ...], ...] = ()  # of tasks by name, `noise` among them; none: that of the data set
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    training: ContinualConfig = ContinualConfig()
    workers: ContinualWorkers = ContinualWorkers()
    experiment: str = "userrep-continual"  # in MLflow

    @model_validator(mode="after")
    def _names_nothing_twice(self) -> Self:
        labels = [Cell(method=m.name, options=m.options, order=("any",)).label for m in self.methods]
        for what, values in (("methods", labels), ("orders", list(self.orders)), ("seeds", list(self.seeds))):
            if len(set(values)) < len(values):
                raise ValueError(f"{what} {values} has an entry twice: its cells would be the same")
        return self

    @model_validator(mode="after")
    def _methods_suit_the_backbone(self) -> Self:
        names = [choice.name for choice in self.methods if not METHODS[choice.name].method.takes_pretrained]
        if names and self.training.backbone.kind == "clue":
            raise ValueError(f"methods {', '.join(names)} cannot go on from a pretrained backbone: leave them out")
        return self

    def pinned(self) -> Self:
        """With the digest of the encoder that the backbone is made from: another encoder makes other cells.

        Raises:
            ConfigError: the config has a digest, and it is that of another encoder.
        """
        encoder = self.training.backbone.encoder
        if encoder is None:
            return self
        backbone = self.training.backbone.model_copy(update={"encoder": encoder.pinned()})
        return self.model_copy(update={"training": self.training.model_copy(update={"backbone": backbone})})

    def with_settings_of(self, cell: Cell) -> Self:
        """With method, options, seed and training of a cell, and no order; tasks, split and workers stay."""
        methods = (MethodChoice(name=cell.method, options=cell.options),)
        taken = {"methods": methods, "seeds": (cell.seed,), "training": cell.training, "orders": ()}
        return self.model_copy(update=taken)

    def identity(self, tasks: TaskSet) -> str:
        """Digest of what cells must share to be compared: data, split and training; not noise, which may come later.

        Args:
            tasks: of seed 0.
        """
        own = tuple(task for task in tasks.tasks if task.name != NOISE)
        digest = digest_tasks(tasks, own, self.training.reads_texts)
        return digest_json({"tasks": digest, "training": self.training.identity()})

    def build_tasks(self, seed: int = 0) -> TaskSet:
        """The tasks as cells with this seed have them, with the one of noise where an order names it.

        Every seed holds out other users, so what is said over seeds is not about a few users alone; but for shards,
        which have one split.
        """
        split = self.split.model_copy(update={"seed": self.split.seed + seed})
        tasks = self.tasks.build(split)
        if self.training.backbone.kind == "clue":  # what it was pretrained for takes the place of the first task
            first, *later = tasks.tasks
            vector = vector_task(first.name, tasks.sequences, first.split)
            tasks = TaskSet(tasks.sequences, (vector, *later), tasks.facts)
        if any(NOISE in order for order in self.orders):
            own_split = tasks.tasks[0].split if isinstance(self.tasks, ShardTasks) else split
            noise = noisy_task(tasks.sequences, own_split, seed=split.seed)
            return TaskSet(tasks.sequences, (*tasks.tasks, noise), tasks.facts)
        return tasks

    def cells(self, tasks: TaskSet) -> list[Cell]:
        """All cells: methods within seeds within orders, so that an experiment that is cut short is comparable.

        Raises:
            ConfigError: an order names a task that there is not.
        """
        known = tuple(task.name for task in tasks.tasks)
        for order in self.orders:
            if unknown := set(order) - set(known):
                raise ConfigError(f"order names {', '.join(sorted(unknown))}: the tasks are {', '.join(known)}")
        return [
            Cell.parse(
                {
                    "method": method.name,
                    "options": method.options,
                    "order": order,
                    "seed": seed,
                    "training": self.training,
                }
            )
            for order in self.orders or (default_order(tasks),)
            for seed in self.seeds
            for method in self.methods
        ]


def default_order(tasks: TaskSet) -> tuple[str, ...]:
    """The order of the data set, without noise."""
    return tuple(task.name for task in tasks.tasks if task.name != NOISE)


def reverse(order: tuple[str, ...]) -> tuple[str, ...]:
    """The order in which the first task stays first: T1, T6, T5, ... T2."""
    return (*order[:1], *reversed(order[1:]))
