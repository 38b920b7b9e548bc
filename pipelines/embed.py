"""Stage `embed`: `encoder/` or `taught/`, and `shards/` -> `embeddings/`: a vector of every user, and one per task."""

from pipelines import evaluate, tokenize
from pipelines.job import Draft, Job, code_version
from pipelines.teach import encoder_table, task_scores
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
                **task_scores(job),
            },
            config=draft.config,
            inputs=draft.inputs,
        )

    job.run_stage("embed", TABLE, config.model_dump(mode="json"), (tokenize.TABLE, table, evaluate.TABLE), write)
