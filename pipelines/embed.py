"""Stage `embed`: `encoder/` or `taught/`, and `shards/` -> `embeddings/`: a vector of every user, and one per task.

Where the encoder compares users with items, `item_embeddings/` has a vector of every item.
"""

from typing import Any

import pyarrow.parquet as pq

from pipelines import evaluate, ingest, pretrain, tokenize
from pipelines.job import Draft, Job, code_commit, code_version
from pipelines.teach import encoder_table, task_facts
from userrep.inference import embed_items, embed_shards
from userrep.publishing.entity import ITEM
from userrep.publishing.quality import QUALITY_NAME
from userrep.publishing.release import EVALUATED_FACT
from userrep.publishing.table import finish_table
from userrep.publishing.verify import BUCKETING_FACT
from userrep.training.encoders import open_encoder
from userrep.training.settings import CluePretraining

TABLE = "embeddings"
SHARD_RULE = "pandas.util.hash_array of the id modulo count"  # `data/split.py`: a part has the users of a shard
ITEM_TABLE = "item_embeddings"


def run(job: Job) -> None:
    """Runs the stage."""
    config, table = job.config.embed, encoder_table(job)

    def write(draft: Draft) -> None:
        encoder, shards = job.manifest(table), job.manifest(tokenize.TABLE)
        quality = job.manifest(evaluate.TABLE).facts
        max_events = job.config.pretrain.views.max_events
        with job.console.progress("embed", "users") as advance:
            parts = embed_shards(
                job.path(table), job.path(tokenize.TABLE), draft.directory, max_events, config.dtype, advance
            )
        systems = quality["systems"]
        finish_table(
            draft.directory,
            parts=parts,
            dim=open_encoder(job.path(table)).dim,
            dtype=config.dtype,
            tasks=task_facts(job).get("order", [])[1:],
            facts={
                "name": job.config.publish.name,
                "encoder_digest": encoder.digest(),
                "tokenizer_digest": shards.facts["tokenizer_digest"],
                "data_digest": shards.digest(),
                **_origin(job),
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
