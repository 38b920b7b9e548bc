"""Stage `embed`: `encoder/` and `shards/` -> `embeddings/`, one vector per user."""

from pipelines import evaluate, pretrain, tokenize
from pipelines.job import Draft, Job, code_version
from userrep.inference import embed_shards
from userrep.publishing.table import finish_table

TABLE = "embeddings"


def run(job: Job) -> None:
    """Runs the stage."""
    config = job.config.embed

    def write(draft: Draft) -> None:
        encoder, shards = job.manifest(pretrain.TABLE), job.manifest(tokenize.TABLE)
        quality = job.manifest(evaluate.TABLE).facts
        max_events = job.config.pretrain.views.max_events
        with job.console.progress("embed", "users") as advance:
            parts = embed_shards(
                job.path(pretrain.TABLE), job.path(tokenize.TABLE), draft.directory, max_events, config.dtype, advance
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
            },
            config=draft.config,
            inputs=draft.inputs,
        )

    job.run_stage(
        "embed", TABLE, config.model_dump(mode="json"), (tokenize.TABLE, pretrain.TABLE, evaluate.TABLE), write
    )
