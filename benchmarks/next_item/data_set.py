"""A data set of the comparison: the split that all systems share, and the texts of its items."""

# pyright: reportAttributeAccessIssue=false
# pyarrow.compute makes its functions at import, unseen by type checkers.

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset

from pipelines import ingest, tokenize
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Job
from pipelines.session import ray_session
from userrep.data.leave_one_out import LeaveOneOut, load_leave_one_out
from userrep.data.sources.parquet import ParquetSource
from userrep.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class DataSet:
    """What a system trains on and is asked about.

    Attributes:
        name: of the set.
        split: users, their held-out events, and the catalogue.
        texts: of every item of the catalogue, (I,).
        train_users: positions of the users whose training histories are learned from, ascending.
    """

    name: str
    split: LeaveOneOut
    texts: list[str]
    train_users: np.ndarray


def load_data_set(name: str, data: Path, workdir: Path, text_columns: tuple[str, ...]) -> DataSet:
    """Ingests and tokenizes `data / name`, unless `workdir` holds that already, and splits it.

    Args:
        name: of the set's folder.
        data: folder of folders with events.parquet and items.parquet.
        workdir: working directory of the job.
        text_columns: of the items, in the order of their text.
    """
    job = Job(JobConfig(source=ParquetSource(path=data / name, text_columns=text_columns)), workdir, Console())
    workdir.mkdir(parents=True, exist_ok=True)
    # Tables that are there already are only read, for which no cluster needs to start.
    is_there = (job.path(tokenize.TABLE) / MANIFEST_NAME).exists()
    with nullcontext() if is_there else ray_session(is_verbose=False):
        ingest.run(job)
        tokenize.run(job)
    split = load_leave_one_out(job.path(tokenize.TABLE), job.manifest(tokenize.TABLE).facts["shards"])
    return DataSet(name, split, _texts(job.path(ingest.TABLE), split), np.arange(len(split)))


def _texts(directory: Path, split: LeaveOneOut) -> list[str]:
    """Text of every item of the catalogue, from the dictionaries of ingested shards."""
    files = [str(path) for path in sorted(directory.glob("shard-*.items.parquet"))]
    table = pyarrow.dataset.dataset(files, format="parquet").to_table(columns=["item_id", "text"])
    return table["text"].take(pc.index_in(split.item_ids, value_set=table["item_id"].combine_chunks())).to_pylist()
