"""Stage `embed`: `encoder/` or `taught/`, and `shards/` -> `embeddings/`: a vector of every user, and one per task."""

from typing import Any

from pipelines import evaluate, tokenize
from pipelines.job import Draft, Job, code_version
from pipelines.teach import encoder_table, task_facts
from userrep.inference import embed_shards
from userrep.publishing.table import finish_table

TABLE = "embeddings"


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
        systems = [name for name, value in quality.items() if isinstance(value, dict)]
        finish_table(
            draft.directory,
            parts=parts,
            dim=job.config.pretrain.model.dim,
            dtype=config.dtype,
            tasks=task_facts(job).get("order", [])[1:],
            facts={
                "name": job.config.publish.name,
                "encoder_digest": encoder.digest(),
                "tokenizer_digest": shards.facts["tokenizer_digest"],
                "data_digest": shards.digest(),
                "code_version": code_version(),
                "quality": {
                    f"recall at {k}, {quality['pool']} test users": {s: quality[s][f"recall_at_{k}"] for s in systems}
                    for k in (1, 10)
                },
                **_task_facts(job),
            },
            config=draft.config,
            inputs=draft.inputs,
        )

    job.run_stage("embed", TABLE, config.model_dump(mode="json"), (tokenize.TABLE, table, evaluate.TABLE), write)


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
