"""Values of jobs and schedules: what runs on Kubernetes, on how much, for how long."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from pipelines.cron import parse_cron
from pipelines.sweep_recurring import find_time_zone
from userrep.config import Config

# An entrypoint passes through two shells, so it holds only what no shell changes.
WORD = r"[A-Za-z0-9_./:=@%+,\[\]-]+"
Word = Annotated[str, StringConstraints(pattern=f"^{WORD}$")]
Dated = Annotated[str, StringConstraints(pattern=r"^[\w./:@+{}-]+$")]  # of a sweep, which passes through no shell
FILE = re.compile(r"\.(ya?ml|json)$")
STAGES = ("ingest", "tokenize", "pretrain", "sweep", "continual", "embed")


class _Job(Config):
    config: Word = Field(default="/mnt/userrep/mine.yaml", description="Named config, or a file on the storage.")
    data: Word | None = Field(default="/mnt/userrep/raw", description="Raw data on the storage; null: of the config.")
    workdir: Word = Field(default="/mnt/userrep/jobs/main", description="Working directory on the storage.")
    overrides: tuple[Word, ...] = Field(
        default=(), description="key=value of the config. No blanks and quotes: such values belong into the file."
    )
    head: str = Field(default="cpu-small", description="Preset of the head, where the driver runs.")
    worker: str = Field(default="cpu-large", description="Preset of the workers.")
    num_workers: int = Field(default=2, ge=1, description="Pods of workers.")
    max_hours: float = Field(default=24.0, gt=0, description="After which it is ended; a sweep begins no cell later.")

    @property
    def needs_directory(self) -> bool:
        """Whether its working directory cannot be in an object store."""
        return False

    def paths(self) -> list[str]:
        """Paths that all pods must see."""
        files = [self.config] if FILE.search(self.config) else []
        return [self.workdir, *files, *filter(None, [self.data])]


class StageJob(_Job):
    """A RayJob that runs one stage once."""

    options: tuple[Word, ...] = Field(default=(), description="Further options of the stage, e.g. [--seeds, '0,1,2'].")


class DiskJob(StageJob):
    """One that runs once, and moves and links files, which an object store cannot."""

    @property
    def needs_directory(self) -> bool:
        """It does."""
        return True


class JobsValues(Config):
    """A RayJob per stage."""

    ingest: StageJob | None = Field(default=StageJob(), description="userrep ingest")
    tokenize: StageJob | None = Field(default=StageJob(), description="userrep tokenize")
    pretrain: StageJob | None = Field(default=StageJob(worker="gpu-1", max_hours=72), description="userrep pretrain")
    sweep: DiskJob | None = Field(
        default=DiskJob(
            config="/mnt/userrep/sweep.yaml", workdir="/mnt/userrep/jobs/scaling", worker="gpu-1", max_hours=72
        ),
        description="userrep sweep run",
    )
    continual: DiskJob | None = Field(
        default=DiskJob(config="/mnt/userrep/tasks.yaml", workdir="/mnt/userrep/jobs/tasks", worker="gpu-1"),
        description="userrep continual",
    )
    embed: StageJob | None = Field(default=StageJob(worker="gpu-1"), description="userrep embed")

    def present(self) -> dict[str, StageJob]:
        """Jobs that are rendered, by stage."""
        found = {stage: getattr(self, stage) for stage in STAGES}
        return {stage: job for stage, job in found.items() if job is not None}


class _Schedule(_Job):
    cron: str = Field(description="Five fields, once a day at most.")
    time_zone: str = Field(default="UTC", description="IANA name, in which cron is read.")
    suspend: bool = Field(default=False, description="Render it, but start nothing.")

    @field_validator("cron")
    @classmethod
    def _fires_once_a_day(cls, text: str) -> str:
        found = parse_cron(text)
        if found.times_per_day > 1:
            raise ValueError(f"{text!r} fires {found.times_per_day} times a day; one minute and one hour are allowed")
        return found.text

    @model_validator(mode="after")
    def _zone_exists(self) -> Self:
        find_time_zone(self.time_zone)
        return self


class SweepSchedule(_Schedule):
    """A sweep that comes back, in a directory of its own each time."""

    cron: str = Field(default="0 3 * * mon", description="Five fields, once a day at most.")
    config: Word = Field(default="/mnt/userrep/sweep.yaml", description="Of the sweep.")
    data: Dated | None = Field(default="/mnt/userrep/raw/{date}", description="Raw data; {date} in it is the run's.")
    workdir: Word = Field(default="/mnt/userrep/sweeps", description="Runs go to WORKDIR/<date>; latest links to one.")
    worker: str = Field(default="gpu-1", description="Preset of the workers.")
    flops_per_s: float | None = Field(
        default=None, ge=1, description="Throughput of a lane, which prices cells; null: measured by the head, a CPU."
    )

    @property
    def needs_directory(self) -> bool:
        """Sweeps move checkpoints, which an object store cannot."""
        return True


class RefreshSchedule(_Schedule):
    """Tables that follow the events, every day."""

    cron: str = Field(default="0 5 * * *", description="Five fields, once a day at most.")
    table: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+@[A-Za-z0-9_-]+$")] = Field(
        default="user_embeddings@champion", description="NAME@ALIAS: users with events after this table are encoded."
    )
    worker: str = Field(default="gpu-1", description="Preset of the workers.")
    max_hours: float = Field(default=12.0, gt=0, description="After which it is ended.")


class SchedulesValues(Config):
    """CronJobs."""

    sweep: SweepSchedule | None = Field(default=SweepSchedule(), description="The sweep that comes back; null: none.")
    embed: RefreshSchedule | None = Field(
        default=RefreshSchedule(), description="userrep embed --since TABLE, every day; null: none."
    )

    def present(self) -> dict[Literal["sweep", "embed"], SweepSchedule | RefreshSchedule]:
        """Schedules that are rendered, by stage."""
        found: dict[Literal["sweep", "embed"], SweepSchedule | RefreshSchedule] = {}
        if self.sweep:
            found["sweep"] = self.sweep
        if self.embed:
            found["embed"] = self.embed
        return found
