"""Stage `publish` goes through the gate: what is worse stays where it is, unless it is forced."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pipelines import embed, evaluate, pretrain, publish
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Draft, Job
from tests.publishing.matrices import rotated, unit_matrix, write_matrix
from userrep.publishing.client import resolve
from userrep.publishing.gate import GateRefusedError

# MLflow 3.17 maps its tables with a loader that SQLAlchemy 2.1 deprecates, once per process.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
USERS = 300


@pytest.fixture
def workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(publish, "run_id_of", lambda *_: None)
    return tmp_path


def publish_table(workdir: Path, seed: int, recall: float, *overrides: str) -> int:
    """Publishes vectors with these figures, as the stages before would have left them. Returns the version in use."""
    job = Job(JobConfig().with_overrides(overrides), workdir, Console())
    hits = (np.arange(USERS) < recall * USERS).astype(float)
    for table in (pretrain.TABLE, evaluate.TABLE, embed.TABLE):
        shutil.rmtree(workdir / table, ignore_errors=True)
    write_matrix(workdir / embed.TABLE, rotated(unit_matrix(USERS, 8, seed=0), seed), quality=hits)
    for table, facts in (
        (pretrain.TABLE, {"run_name": "run", "run_key": "key"}),
        (evaluate.TABLE, {"encoder": {"recall_at_10": recall}}),
    ):
        (workdir / table).mkdir()
        Draft(workdir / table, "test", {}, {}).commit(table, facts)
    publish.run(job)
    return resolve("user_embeddings@champion", tracking_uri=publish.tracking_uri(workdir)).version


def test_a_worse_table_is_refused_and_force_is_a_line_of_config(workdir: Path) -> None:
    assert publish_table(workdir, 0, 0.6) == 1
    assert publish_table(workdir, 1, 0.6) == 2
    with pytest.raises(GateRefusedError, match=r"stays at version 2(.|\n)*test/recall_at_10: 0.6000 -> 0.4000"):
        publish_table(workdir, 2, 0.4)
    assert publish_table(workdir, 2, 0.4, "publish.gate.force=true") == 3
    version = resolve("user_embeddings@champion", tracking_uri=publish.tracking_uri(workdir))
    assert list(json.loads(version.tags["userrep.forced.champion"])["overridden"]) == ["test/recall_at_10"]
    assert publish_table(workdir, 3, 0.2, "publish.gate.max_drop=0.5") == 4
