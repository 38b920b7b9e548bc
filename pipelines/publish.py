"""Stages `publish` and `pull`: `embeddings/` -> a version in the registry -> `pulled/`, verified."""

import json

from pipelines import embed, evaluate, pretrain
from pipelines.job import Draft, Job
from pipelines.mlflow_store import artifact_root, tracking_uri
from pipelines.tracking import run_id_of
from userrep import table_versions
from userrep.mirror import shown
from userrep.publishing.client import pull
from userrep.publishing.connection import redacted
from userrep.publishing.release import release

TABLE = "published"
ITEM_TABLE = "published_items"
PULLED = "pulled"
RECORD = "version.json"


def run(job: Job) -> None:
    """Runs stage `publish`; where items have vectors, their table is published beside that of the users."""
    quality = job.manifest(evaluate.TABLE).facts["encoder"]
    metrics = {f"test/{key}": value for key, value in quality.items()}
    _publish(job, "publish", embed.TABLE, TABLE, job.config.publish.name, (evaluate.TABLE,), metrics)
    if embed.has_items(job):
        _publish(job, "publish items", embed.ITEM_TABLE, ITEM_TABLE, embed.item_table_name(job), (), {})


def _publish(
    job: Job, stage: str, table: str, target: str, name: str, inputs: tuple[str, ...], metrics: dict[str, float]
) -> None:
    """Registers `table` as a new version of `name`; what was registered stands in `target`."""
    config, uri = job.config.publish, tracking_uri(job.workdir)

    def write(draft: Draft) -> None:
        encoder = job.manifest(pretrain.TABLE).facts
        released = release(
            job.path(table),
            name,
            config.alias,
            tracking_uri=uri,
            experiment=config.experiment,
            run_id=run_id_of(job, encoder["run_name"], encoder["run_key"]),
            metrics=metrics,
            tags={"config": job.config.name},
            artifact_root=artifact_root(job.workdir),
            gate=config.gate if metrics else config.gate.model_copy(update={"metrics": ()}),
            scratch=job.workdir,
            verbose=job.console.is_verbose,
        )
        published, report = released.published, released.report
        for check in report.checks if report else ():
            job.console.say(f"{stage}: {'passes' if check.is_passed else 'FORCED'}: {check.what}: {check.detail}")
        record = {"name": published.name, "version": published.version, "alias": published.alias}
        (draft.directory / RECORD).write_text(json.dumps(record))
        rows = job.manifest(table).facts["rows"]
        draft.commit(
            "published", {**record, "rows": rows, "model_id": published.model_id, "sha256": published.table_sha256}
        )
        job.console.say(f"{stage}: {published.name}@{published.alias} is version {published.version}")

    resolved = {**config.model_dump(mode="json"), "tracking_uri": redacted(uri)}
    job.run_stage(stage, target, resolved, (pretrain.TABLE, *inputs, table), write)


def run_pull(job: Job) -> dict[str, object]:
    """Pulls the published version by its alias into the working directory, as a downstream team would.

    Returns:
        `verified` (the pulled bytes are those that were published) and `directory`.
    """
    config = job.config.publish
    reference = f"{config.name}@{config.alias}"
    uri, target = tracking_uri(job.workdir), job.workdir / PULLED
    with table_versions.staged_table(target, stages_itself=True) as directory:
        pulled = pull(reference, directory, tracking_uri=uri, verbose=job.console.is_verbose)
    expected = job.manifest(TABLE).facts["sha256"]
    return {"verified": pulled.manifest.facts["table_sha256"] == expected, "directory": shown(target)}
