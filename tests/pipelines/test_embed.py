"""Stage `embed` without its actors: what the manifest says, what lies beside the parts, int8 on the way to disk."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines import embed, evaluate, pretrain, tokenize
from pipelines.config import JobConfig
from pipelines.console import Console
from pipelines.job import Draft, Job
from tests.publishing.matrices import unit_matrix, write_matrix
from userrep.config import ConfigError
from userrep.manifest import FileEntry
from userrep.publishing.quality import QUALITY_NAME, quality_rows, user_key
from userrep.publishing.verify import part_entries, verify_table
from userrep.refresh import RefreshCounts

QUALITY = {"recall_at_1": 0.25, "recall_at_10": 0.5}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job whose encoder, shards and evaluation are there, and whose actors write given vectors as int8."""
    job = Job(JobConfig().with_overrides(["embed.dtype=int8", "embed.id_space=shop"]), tmp_path, Console())
    for table, facts in (
        (tokenize.TABLE, {"tokenizer_digest": "t"}),
        (pretrain.TABLE, {}),
        (
            evaluate.TABLE,
            {"systems": ["encoder"], "encoder": QUALITY, "pool": 40, "slices": {"up to 9 events": QUALITY}},
        ),
    ):
        (tmp_path / table).mkdir()
        if table == evaluate.TABLE:
            rows = quality_rows(["u1", "u2"], {"test/recall_at_10": [0.0, 1.0]})
            pq.write_table(rows, tmp_path / table / QUALITY_NAME)
        Draft(tmp_path / table, "test", {}, {}).commit(table, facts)

    def embed_shards(
        encoder: Path, shards: Path, target: Path, max_events: int, dtype: str, *_: object
    ) -> list[FileEntry]:
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        made = write_matrix(tmp_path / "made", unit_matrix(90, 8, seed=0), dtype=dtype)
        for entry in part_entries(made):
            (tmp_path / "made" / entry.path).rename(target / entry.path)
        return list(part_entries(made))

    monkeypatch.setattr(embed, "embed_shards", embed_shards)
    monkeypatch.setattr(embed, "open_encoder", lambda _: SimpleNamespace(dim=8))
    return job


def test_the_manifest_says_what_readers_compare_by(job: Job) -> None:
    embed.run(job)
    manifest = verify_table(job.path(embed.TABLE))
    facts = manifest.facts
    assert (facts["dtype"], facts["id_space"], facts["num_evaluated"]) == ("int8", "shop", 40)
    assert facts["bucketing"]["count"] == 3
    assert facts["quantisation"]["vectors"] == 90
    assert len(facts.get("code_commit", "")) in (0, 40)
    kept = pq.read_table(job.path(embed.TABLE) / QUALITY_NAME)
    assert kept["key"].to_pylist() == [user_key("u1"), user_key("u2")]
    card = (job.path(embed.TABLE) / "card.md").read_text()
    assert "| up to 9 events | 0.2500 | 0.5000 |" in card


def test_a_refresh_says_what_it_kept_and_a_rebuild_why_it_kept_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    embed.run(job)
    shutil.move(job.path(embed.TABLE), tmp_path / "earlier")
    since = verify_table(tmp_path / "earlier").facts["table_sha256"]
    monkeypatch.setattr(embed, "why_not", lambda *_: "")
    made = embed.embed_shards

    def refresh_shards(
        encoder: Path, shards: Path, old: Path, *rest: Any
    ) -> tuple[list[FileEntry], RefreshCounts, str]:
        assert old == tmp_path / "earlier"
        return made(encoder, shards, *rest), RefreshCounts(1, 2, 87, 3), ""

    monkeypatch.setattr(embed, "refresh_shards", refresh_shards)
    embed.run(job, since="earlier")  # below the working directory
    counts = {"new": 1, "changed": 2, "unchanged": 87, "removed": 3}
    assert verify_table(job.path(embed.TABLE)).facts["refresh"] == {"since": since, **counts}
    card = (job.path(embed.TABLE) / "card.md").read_text()
    assert f"| changed since table {since[:12]} | 2 |" in card
    shutil.rmtree(job.path(embed.TABLE))
    monkeypatch.setattr(embed, "why_not", lambda *_: "dtype is another")
    embed.run(job, since=str(tmp_path / "earlier"))
    counts = {"new": 0, "changed": 90, "unchanged": 0, "removed": 0}
    facts = verify_table(job.path(embed.TABLE)).facts
    assert facts["refresh"] == {"since": since, **counts, "rebuilt": "dtype is another"}
    assert "every user is encoded, nothing is kept of" in "".join(capsys.readouterr())
    shutil.rmtree(job.path(embed.TABLE))
    with pytest.raises(ConfigError, match="there is no table of this name; give its directory, or NAME@ALIAS"):
        embed.run(job, since="no/such/table")


def test_slices_part_the_users_by_their_events() -> None:
    samples = SimpleNamespace(anchor_lengths=np.array([1, 2, 3, 4]), positive_lengths=np.array([1, 2, 3, 4]))
    hits = {10: np.array([0.0, 1.0, 1.0, 1.0])}
    slices = evaluate.slices_of(samples, hits)
    assert slices == {
        "up to 5 events": {"users": 2.0, "recall_at_10": 0.5},
        "more than 5 events": {"users": 2.0, "recall_at_10": 1.0},
    }
