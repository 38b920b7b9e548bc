"""Stage `pretrain`: `shards/` -> `encoder/`, the weights with the best retrieval of validation users.

Progress lives in `runs/<hash of config and data>/`, so the same command resumes and a changed config starts anew.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from pipelines import tokenize
from pipelines.job import Draft, Job
from pipelines.tracking import RUNS, tracked
from userrep import storage
from userrep.config import digest_json
from userrep.data.features import VALUES_FILE, VOCABULARY_FILE
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.manifest import read_manifest
from userrep.mirror import shown
from userrep.models.clue import count_parameters
from userrep.models.recformer import Recformer
from userrep.training.checkpoint import BEST_METRIC, CHECKPOINTS, DAMAGED, MODEL_FILE, best_checkpoint
from userrep.training.launch import train
from userrep.training.log_pieces import receive_log
from userrep.training.run_record import RunRecord
from userrep.training.settings import open_training_stream
from userrep.training.systems import open_system
from userrep.training.tracking import SPOOL_NAME, SpoolReader

TABLE = "encoder"
POLL_INTERVAL_S = 1.0
LOG_INTERVAL_S = 5.0  # between looks into object storage


def run(job: Job) -> None:
    """Runs the stage."""
    config = job.config.pretrain
    resolved = config.model_dump(mode="json")

    def write(draft: Draft) -> None:
        run_dir = job.workdir / RUNS / digest_json({"config": resolved, "inputs": draft.inputs})
        run_dir.mkdir(parents=True, exist_ok=True)
        stream = open_training_stream(job.path(tokenize.TABLE), config)
        for source, coverage in zip(stream.directories, stream.plan.coverage(config.num_steps), strict=True):
            job.console.say(f"pretrain: {shown(source)}: {coverage}")
        with tracked(job, run_dir, resolved), _progress(job, run_dir):
            train(job.path(tokenize.TABLE), run_dir, config, job.config.workers)
        _export(job, draft, run_dir)

    inputs = (tokenize.TABLE, *(str(other.shards) for other in config.mix))
    job.run_stage("pretrain", TABLE, resolved, inputs, write)


def _export(job: Job, draft: Draft, run_dir: Path) -> None:
    receive_log(run_dir / SPOOL_NAME)
    checkpoint = best_checkpoint(run_dir / CHECKPOINTS)
    assert checkpoint is not None, "a finished run has validated at its last step"
    shutil.copyfile(checkpoint / MODEL_FILE, draft.directory / MODEL_FILE)
    config, shards, facts = job.config.pretrain, job.manifest(tokenize.TABLE).facts, read_manifest(checkpoint).facts
    for name in (TOKENIZER_NAME, *((VALUES_FILE, VOCABULARY_FILE) if config.system == "two_tower" else ())):
        shutil.copyfile(job.path(tokenize.TABLE) / name, draft.directory / name)
    model = open_system(config, job.path(tokenize.TABLE)).build_model()
    speed = training_speed(run_dir / SPOOL_NAME, config.global_batch_size)
    draft.commit(
        "encoder",
        {
            "rows": config.num_steps * config.global_batch_size,
            "best": facts,
            "run_name": run_dir.name,
            "run_key": RunRecord.read(run_dir).key,
            "curve": training_curve(run_dir / SPOOL_NAME),
            "speed": speed,
            "model": model.config.model_dump(mode="json"),  # a backbone has a shape of its own
            "parameters": count_parameters(model),
            "vocab_size": shards["vocab_size"],
            "num_embeddings": model.token_embedding.num_embeddings if isinstance(model, Recformer) else None,
            "attributes": job.manifest(tokenize.TABLE).config["attributes"],
            "tokenizer_digest": shards["tokenizer_digest"],
        },
    )
    job.console.say(
        f"pretrain: {speed['users_per_s']:,.0f} users/s in the median step, "
        f"{speed['input_wait_fraction']:.1%} of the time spent waiting for input"
    )
    if (interval_s := checkpoint_interval_s(run_dir / SPOOL_NAME)) is not None:
        job.console.say(f"pretrain: a checkpoint was due every {interval_s:.1f} s, by what one costs")
    if damaged := list(storage.directories(run_dir / CHECKPOINTS, f"{DAMAGED}*")):
        job.console.say(f"pretrain: {len(damaged)} damaged checkpoints were passed over, see {shown(damaged[-1])}")


def training_curve(spool: Path) -> list[dict[str, Any]]:
    """Points of the first attempt at each step, by step: those that MLflow has."""
    points: dict[int, dict[str, Any]] = {}
    for point in SpoolReader(spool).read():
        points.setdefault(point["step"], point)
    return [points[step] for step in sorted(points)]


def training_speed(spool: Path, global_batch_size: int) -> dict[str, float]:
    """How fast the steps of all attempts of a run were, as its first worker saw them.

    Args:
        spool: metrics of at least one step.
        global_batch_size: users of a step.

    Returns:
        `users_per_s`: of the median step, without waiting. `input_wait_fraction`: share of waiting for input in waiting
        and steps, 0..1. It leaves out the first step of every start, whose wait holds the start of Ray Data; a start is
        where steps do not follow each other, so one that follows right after the step of a checkpoint is not seen.
    """
    points = SpoolReader(spool).read()
    steps = [point["metrics"] for before, point in pairwise(points) if point["step"] == before["step"] + 1]
    wait_s, step_s = (sum(metrics[f"time/{name}"] for metrics in steps) for name in ("input_wait_s", "step_s"))
    return {
        "users_per_s": round(global_batch_size / median(point["metrics"]["time/step_s"] for point in points), 1),
        "input_wait_fraction": round(wait_s / (wait_s + step_s), 4) if steps else 0.0,
    }


def checkpoint_interval_s(spool: Path) -> float | None:
    """Seconds from one checkpoint to the next that was due, median over a run; None when it saved fewer than two."""
    key = "time/checkpoint_interval_s"
    intervals = [point["metrics"][key] for point in SpoolReader(spool).read() if key in point["metrics"]]
    return median(intervals) if intervals else None


@contextmanager
def _progress(job: Job, run_dir: Path) -> Iterator[None]:
    """Shows what the spool says while the block runs; that cannot hold up training."""
    stop = threading.Event()
    reader = SpoolReader(run_dir / SPOOL_NAME)
    reader.read()  # the rate is that of this attempt
    config = job.config.pretrain

    def follow() -> None:
        validation, first_step = "", None
        with job.console.progress("pretrain", "users") as advance:
            while not stop.wait(POLL_INTERVAL_S):
                with suppress(OSError):
                    receive_log(run_dir / SPOOL_NAME, LOG_INTERVAL_S)
                for point in reader.read():
                    metrics, step = point["metrics"], point["step"]
                    if first_step is None:
                        first_step = step
                    if BEST_METRIC in metrics:
                        validation = f", validation recall@10 {metrics[BEST_METRIC]:.3f}"
                    note = f"loss {metrics['train/loss']:.3f}{validation}"
                    advance(step, config.num_steps, (step - first_step + 1) * config.global_batch_size, note)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        with suppress(OSError):
            receive_log(run_dir / SPOOL_NAME)  # for MLflow, also of a run that has failed
