"""Stage `ingest`: raw data of a source -> `ingest/`, shards with item texts."""

import shutil
from pathlib import Path

from pipelines.job import Draft, Job
from userrep import storage
from userrep.config import ConfigError, digest_json
from userrep.data.ingest import TooManyBadRecordsError, assemble_shards, check_bad_fraction, parse_source
from userrep.data.parse import QUARANTINE, SPILL
from userrep.mirror import shown

TABLE = "ingest"
MAX_SERVICES = 127  # int8 in the shards


def run(job: Job) -> None:
    """Runs the stage."""
    config, source, kept = job.config.ingest, job.config.source, job.workdir / QUARANTINE

    def write(draft: Draft) -> None:
        services = source.services()
        if len(services) > MAX_SERVICES:
            raise ConfigError(
                f"the source has {len(services)} services, a shard can tell {MAX_SERVICES} apart: merge some"
            )
        try:
            with job.console.progress("ingest: reading", "records") as advance:
                counts = parse_source(source, config.num_shards, draft.directory, advance)
            check_bad_fraction(counts, config.max_bad_fraction, shown(kept))
            with job.console.progress("ingest: building shards", "events") as advance:
                shards = assemble_shards(services, config, draft.directory, advance)
            counts["events"]["rejected"] += sum(shard["unknown_item"] for shard in shards)
            check_bad_fraction(counts, config.max_bad_fraction, shown(kept))
        except TooManyBadRecordsError:
            _keep_quarantine(job, draft)
            raise
        storage.remove(draft.directory / SPILL)
        storage.remove(kept)  # of an earlier, failed attempt
        rejected = sum(count["rejected"] for count in counts.values())
        if rejected:
            job.console.say(f"ingest: {rejected:,} bad records, see {shown(job.workdir / TABLE)}, {QUARANTINE}")
        draft.commit(
            "shards_text",
            {
                "rows": sum(shard["events"] for shard in shards),
                "users": sum(shard["users"] for shard in shards),
                "duplicates": sum(shard["duplicates"] for shard in shards),
                "events_of_rejected_items": sum(shard["rejected_item"] for shard in shards),
                "services": services,
                "counts": counts,
                "shards": shards,
            },
        )

    resolved = {
        "source": source.model_dump(mode="json"),
        "ingest": config.model_dump(mode="json"),
        "files": raw_files_digest(job),
    }
    job.run_stage("ingest", TABLE, resolved, (), write)


def raw_files_digest(job: Job) -> str:
    """Digest of name, size and time of change of every file below the source's path, so that new data is noticed."""
    root = Path(getattr(job.config.source, "path", ""))
    if root == Path():
        return ""
    paths = sorted(root.rglob("*")) if root.is_dir() else [root]
    stats = [(path, path.stat()) for path in paths if path.is_file() and job.workdir not in path.parents]
    return digest_json([[str(path.relative_to(root)), stat.st_size, stat.st_mtime_ns] for path, stat in stats])


def _keep_quarantine(job: Job, draft: Draft) -> None:
    """The failed table goes, its rejected records stay for the user to read."""
    storage.receive(draft.directory, f"{QUARANTINE}/*")
    kept = job.workdir / QUARANTINE
    storage.remove(kept)
    shutil.move(draft.directory / QUARANTINE, kept)
    shutil.rmtree(draft.directory)
    storage.send(job.workdir, f"{QUARANTINE}/*")
