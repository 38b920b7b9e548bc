"""What MLflow is told of a run besides its metrics; kept beside the spool, so that it can be told later."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import Field

from userrep import storage
from userrep.config import Config
from userrep.manifest import write_json

RECORD_NAME = "tracking.json"
RUNNING = "RUNNING"


class RunRecord(Config):
    """The record of one run.

    Attributes:
        experiment: name of the experiment.
        config: resolved config, logged as parameters.
        status: RUNNING until the job has ended, then MLflow's word for how: FINISHED, FAILED or KILLED.
        key: of this run directory and no other, by which MLflow knows the run: the same training in another directory
            has other points for the same steps.
        stage: that the run is of.
        name: of the run, for people; empty: that of the directory.
        parent: key of the run below which MLflow shows this one; empty: none.
    """

    experiment: str
    config: dict[str, Any]
    status: str = RUNNING
    key: str = Field(default_factory=lambda: uuid4().hex)
    stage: str = "pretrain"
    name: str = ""
    parent: str = ""

    @classmethod
    def start(cls, run_dir: Path, experiment: str, config: dict[str, Any], **more: str) -> "RunRecord":
        """Writes the record of a run that begins or goes on; one that goes on keeps its key.

        Args:
            run_dir: holds the record.
            experiment: as above, and so are config and more: `stage`, `name`, `parent`.
        """
        record = cls.parse({"experiment": experiment, "config": config, **more})
        storage.refresh(run_dir / RECORD_NAME)
        if (run_dir / RECORD_NAME).exists():
            record = record.model_copy(update={"key": cls.read(run_dir).key})
        record.write(run_dir)
        return record

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Reads it from a run directory."""
        storage.refresh(run_dir / RECORD_NAME)
        return cls.parse(json.loads((run_dir / RECORD_NAME).read_text()))

    def write(self, run_dir: Path) -> None:
        """Writes it into a run directory, in one step."""
        write_json(run_dir / RECORD_NAME, self.model_dump(mode="json"))
        storage.send(run_dir, RECORD_NAME)
