"""The complete config of a scaling-law sweep."""

from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config import JobConfig
from userrep.config import Config
from userrep.scaling.grid import GridConfig
from userrep.scaling.rules import LadderConfig
from userrep.training.cell_evaluation import EvaluationConfig
from userrep.training.encoding import MemoryConfig


class LanesConfig(Config):
    """Where cells are run. No part of a cell's identity.

    A lane is a group of workers that is started once and runs cell after cell.
    """

    num_lanes: int = Field(default=0, ge=0)  # side by side; 0: as many as the cluster has room for
    num_workers: PositiveInt = 1  # of a lane; they share each batch
    threads: PositiveInt = 1  # torch threads of a worker, and CPUs that it reserves
    use_gpu: bool = False
    memory: MemoryConfig = MemoryConfig()
    retries: int = Field(default=1, ge=0)  # of a cell whose worker was lost
    # A cell that takes so many times as long as it was priced, and at least `min_timeout_s`, counts as hung.
    timeout_factor: PositiveFloat = 5.0
    min_timeout_s: PositiveInt = 900
    checkpoint_s: PositiveInt = 120  # seconds of steps that a kill may cost, at the constant learning rate


class SweepConfig(Config):
    """Everything that `userrep sweep` does."""

    name: str = "sweep"
    job: JobConfig = JobConfig()  # the data, and what cells do not replace of `pretrain`
    grids: tuple[GridConfig, ...] = Field(min_length=1)  # designs; a cell that is in several of them is one cell
    ladder: LadderConfig = LadderConfig()
    evaluation: EvaluationConfig = EvaluationConfig()  # the same for all cells
    lanes: LanesConfig = LanesConfig()
    experiment: str = "userrep-sweeps"  # in MLflow

    @model_validator(mode="after")
    def _runs_share_their_steps(self) -> Self:
        if self.job.clue.optim.schedule != "wsd":
            raise ValueError(
                f"job.pretrain.optim.schedule={self.job.clue.optim.schedule}: cells of several durations share "
                "their steps at a constant learning rate, set it to wsd"
            )
        if self.job.clue.mix:
            raise ValueError("job.pretrain.mix is not empty: a sweep is over one data set, leave it out")
        return self

    @model_validator(mode="after")
    def _probes_have_the_longest_histories(self) -> Self:
        centers = [grid.center.max_events for grid in self.grids if grid.center]
        longest = max([*centers, *(events for grid in self.grids for events in grid.max_events)], default=1)
        if longest > self.evaluation.probe_max_events:
            raise ValueError(
                f"grids has cells with histories of {longest} events, and evaluation.probe_max_events="
                f"{self.evaluation.probe_max_events}: raise it to {longest}"
            )
        return self
