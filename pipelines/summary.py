"""`summary.json`: what a job measured, in one flat place."""

import os
import platform
from importlib.metadata import version
from typing import Any

from pipelines import embed, evaluate, ingest, pretrain, publish, tokenize
from pipelines.job import Job
from pipelines.session import PeakMemory
from pipelines.teach import task_facts

PACKAGES = ("ray", "torch", "mlflow", "pyarrow", "transformers", "tokenizers", "numpy")


def summarize(job: Job, pulled: dict[str, object], memory: PeakMemory, seconds: float) -> dict[str, Any]:
    """Collects the facts of all manifests. Times of skipped stages are those of the run that made their tables."""
    source, table = job.manifest(ingest.TABLE).facts, job.manifest(embed.TABLE).facts
    results = job.manifest(evaluate.TABLE).facts
    published = job.manifest(publish.TABLE).facts
    baselines = {name: value for name, value in results.items() if name in results["systems"] and name != "encoder"}
    return {
        "config": job.config.name,
        "seconds": round(seconds, 2),
        "peak_rss_bytes": memory.job_bytes,
        "driver_peak_rss_bytes": memory.driver_bytes,
        "stages": {
            report.stage: {"seconds": round(report.seconds, 2), "rows": report.rows, "skipped": report.is_skipped}
            for report in job.reports
        },
        "data": {
            "users": source["users"],
            "events": source["rows"],
            "items": source["counts"]["items"]["records"],
            "services": source["services"],
            "rejected": {name: count["rejected"] for name, count in source["counts"].items()},
            "duplicates": source["duplicates"],
            "tokens_per_item": round(job.manifest(tokenize.TABLE).facts["tokens_per_item"], 2),
        },
        "pretrain": _pretrain(job) | {"pool": results["pool"], "views": results["views"]} | results["encoder"],
        "baselines": baselines,
        "corpus": results.get("corpus", {}),
        "tasks": task_facts(job),
        "table": {
            "name": published["name"],
            "version": published["version"],
            "alias": published["alias"],
            "rows": table["rows"],
            "dim": table["dim"],
            "dtype": table["dtype"],
            "sha256": table["table_sha256"],
        },
        "pull": pulled,
        "environment": {
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_average_1m": round(os.getloadavg()[0], 2),
            **{package: version(package) for package in PACKAGES},
        },
    }


def _pretrain(job: Job) -> dict[str, Any]:
    facts = job.manifest(pretrain.TABLE).facts
    return {
        "steps": facts["curve"][-1]["step"],
        "samples_seen": facts["curve"][-1]["step"] * job.config.pretrain.global_batch_size,
        **facts["speed"],
        "val_loss": facts["best"]["metrics"]["val/loss"],
        "best_step": facts["best"]["step"],
        "batch_hash": facts["best"]["batch_hash"],
        "parameters": facts["parameters"],
    }
