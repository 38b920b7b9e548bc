"""Stage `embed`: `encoder/` or `taught/`, and `shards/` -> `embeddings/`: a vector of every user, and one per task.

Where the encoder compares users with items, `item_embeddings/` has a vector of every item.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines import evaluate, ingest, pretrain, tokenize
from pipelines.job import Draft, Job, code_commit, code_version
from pipelines.since import table_directory
from pipelines.teach import encoder_table, task_facts
from userrep.inference import embed_items, embed_shards
from userrep.manifest import FileEntry
from userrep.publishing.entity import ITEM, USER
from userrep.publishing.quality import QUALITY_NAME
from userrep.publishing.release import EVALUATED_FACT
from userrep.publishing.table import finish_table
from userrep.publishing.verify import BUCKETING_FACT, PART_NAME, table_manifest
from userrep.refresh import RefreshCounts, encoding_fact, rebuilt_counts, refresh_shards, why_not
from userrep.training.encoders import open_encoder
from userrep.training.settings import CluePretraining

TABLE = "embeddings"
ENCODING_FACT = "encoding"  # what a vector's bits depend on besides encoder and user
REFRESH_FACT = "refresh"  # users new, changed, unchanged and removed since an earlier table
SHARD_RULE = "pandas.util.hash_array of the id modulo count"  # `data/split.py`: a part has the users of a shard
ITEM_TABLE = "item_embeddings"


def run(job: Job, since: str = "") -> None:
    """Runs the stage.

    Args:
        job: the job.
        since: directory of an earlier table, or NAME@ALIAS, NAME@v12 or NAME/12 of a published one: users whose input
            has not changed keep the vectors that they have there. The table that is written is the same without it.
    """
    config, table = job.config.embed, encoder_table(job)

    def write(draft: Draft) -> None:
        encoder, shards = job.manifest(table), job.manifest(tokenize.TABLE)
        quality = job.manifest(evaluate.TABLE).facts
        tasks = task_facts(job).get("order", [])[1:]
        origin = {
            "encoder_digest": encoder.digest(),
            "tokenizer_digest": shards.facts["tokenizer_digest"],
            ENCODING_FACT: encoding_fact(job.config.pretrain.views.max_events),
        }
        wanted = {**origin, "dtype": config.dtype, "tasks": tasks or None}
        entries, refresh = _encode(job, draft.directory, wanted, since)
        systems = quality["systems"]
        parts = [entry for entry in entries if PART_NAME.fullmatch(entry.path)]
        finish_table(
            draft.directory,
            parts=parts,
            input_files=[entry for entry in entries if entry not in parts],
            dim=open_encoder(job.path(table)).dim,
            dtype=config.dtype,
            tasks=tasks,
            facts={
                "name": job.config.publish.name,
                **origin,
                "data_digest": shards.digest(),
                **_origin(job),
                **refresh,
                EVALUATED_FACT: quality["pool"],
                BUCKETING_FACT: {"rule": SHARD_RULE, "count": len(parts)},
                "slices": quality["slices"],
                "quality": {
                    f"recall at {k}, {quality['pool']} test users": {s: quality[s][f"recall_at_{k}"] for s in systems}
                    for k in (1, 10)
                },
                **_task_facts(job),
            },
            config=draft.config,
            inputs=draft.inputs,
            quality_rows=pq.read_table(job.path(evaluate.TABLE) / QUALITY_NAME),
        )

    job.run_stage("embed", TABLE, config.model_dump(mode="json"), (tokenize.TABLE, table, evaluate.TABLE), write)
    if has_items(job):
        _embed_items(job)


def _encode(
    job: Job, target: Path, facts: dict[str, Any], since: str
) -> tuple[list[FileEntry], dict[str, dict[str, Any]]]:
    """Writes the parts. Returns entries of all files, and the fact that says what was kept of an earlier table."""
    encoder, shards, config = job.path(encoder_table(job)), job.path(tokenize.TABLE), job.config.embed
    max_events = job.config.pretrain.views.max_events

    def rebuild() -> list[FileEntry]:
        with job.console.progress("embed", "users") as advance:
            return embed_shards(encoder, shards, target, max_events, config.dtype, advance)

    if not since:
        return rebuild(), {}
    with table_directory(since, job.workdir, job.console.is_verbose) as old:
        manifest = table_manifest(old, USER)
        reason = why_not(manifest, encoder, shards, facts)
        entries, counts = list[FileEntry](), RefreshCounts(0, 0, 0, 0)
        if not reason:
            with job.console.progress("embed", "users") as advance:
                entries, counts, reason = refresh_shards(
                    encoder, shards, old, target, max_events, config.dtype, advance
                )
        if reason:
            job.console.say(f"embed: every user is encoded, nothing is kept of {since}: {reason}")
            entries = rebuild()
            counts = rebuilt_counts(old, entries, target)
    fact = {"since": manifest.facts["table_sha256"], **vars(counts), **({"rebuilt": reason} if reason else {})}
    job.console.say(
        f"embed: since {since}: {counts.new:,} users new, {counts.changed:,} changed, {counts.unchanged:,} unchanged, "
        f"{counts.removed:,} removed"
    )
    return entries, {REFRESH_FACT: fact}


def has_items(job: Job) -> bool:
    """Whether the job's encoder has vectors of items beside those of users, in one space."""
    return not isinstance(job.config.pretrain, CluePretraining)


def _embed_items(job: Job) -> None:
    """`encoder/` and `ingest/` -> `item_embeddings/`: a vector of every item of the catalogue."""
    config = job.config.embed

    def write(draft: Draft) -> None:
        encoder, shards = job.manifest(pretrain.TABLE), job.manifest(tokenize.TABLE)
        num_parts = len(shards.facts["shards"])
        with job.console.progress("embed items", "items") as advance:
            parts = embed_items(
                job.path(pretrain.TABLE), job.path(ingest.TABLE), draft.directory, num_parts, config.dtype, advance
            )
        finish_table(
            draft.directory,
            parts=parts,
            dim=open_encoder(job.path(pretrain.TABLE)).dim,
            dtype=config.dtype,
            facts={
                "name": item_table_name(job),
                "encoder_digest": encoder.digest(),
                "tokenizer_digest": shards.facts["tokenizer_digest"],
                "data_digest": shards.digest(),
                **_origin(job),
                "limits": ["The dot product with a user vector of the same encoder ranks the user's next items."],
            },
            config=draft.config,
            inputs=draft.inputs,
            entity=ITEM,
        )

    job.run_stage(
        "embed items", ITEM_TABLE, config.model_dump(mode="json"), (ingest.TABLE, tokenize.TABLE, pretrain.TABLE), write
    )


def _origin(job: Job) -> dict[str, str]:
    """By which code, and with ids of what."""
    commit = code_commit()
    origin = {"code_version": code_version(), "id_space": job.config.embed.id_space or job.config.name}
    return {**origin, "code_commit": commit} if commit else origin


def item_table_name(job: Job) -> str:
    """Registered name of the item table."""
    return f"{job.config.publish.name}_items"


def _task_facts(job: Job) -> dict[str, dict[str, Any]]:
    """What the card says of the tasks that have a column."""
    facts = task_facts(job)
    if not facts:
        return {}
    places = range(1, len(facts["order"]))
    return {
        "task_kinds": {facts["order"][i]: facts["kinds"][i] for i in places},
        "task_scores": {facts["order"][i]: {facts["metrics"][i]: facts["matrix"][-1][i]} for i in places},
    }
