"""Stage `pretrain`: `shards/` -> `encoder/`, the weights with the lowest validation loss.

Progress lives in `runs/<hash of config and data>/`, so the same command resumes and a changed config starts anew.
"""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from mlflow.tracking import MlflowClient

from pipelines import tokenize
from pipelines.job import Draft, Job
from pipelines.mlflow_store import artifact_root, tracking_uri
from userrep.config import digest_json
from userrep.data.tokenizer import TOKENIZER_NAME
from userrep.manifest import read_manifest
from userrep.models.clue import Clue, count_parameters
from userrep.training.checkpoint import MODEL_FILE, best_checkpoint
from userrep.training.loop import CHECKPOINTS, SPOOL_NAME, train
from userrep.training.tracking import MlflowReplay, SpoolReader, open_run

TABLE = "encoder"
POLL_INTERVAL_S = 1.0


def run(job: Job) -> None:
    """Runs the stage."""
    config = job.config.pretrain
    resolved = config.model_dump(mode="json")

    def write(draft: Draft) -> None:
        run_dir = job.workdir / "runs" / digest_json({"config": resolved, "inputs": draft.inputs})
        run_dir.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(tracking_uri(job))
        run_id = open_run(client, job.config.publish.experiment, run_dir.name, resolved, artifact_root(job))
        replay = MlflowReplay(client, run_id, run_dir / SPOOL_NAME)
        status = "FAILED"
        try:
            with _follow(job, run_dir, replay):
                train(job.path(tokenize.TABLE), run_dir, config, job.config.workers)
            status = "FINISHED"
        finally:
            if (reason := replay.try_flush()) is not None:
                job.console.say(
                    f"pretrain: MLflow did not take all metrics ({reason}); they stay in {run_dir / SPOOL_NAME}"
                )
            else:
                client.set_terminated(run_id, status)
        _export(job, draft, run_dir, run_id)

    job.run_stage("pretrain", TABLE, resolved, (tokenize.TABLE,), write)


def _export(job: Job, draft: Draft, run_dir: Path, run_id: str) -> None:
    checkpoint = best_checkpoint(run_dir / CHECKPOINTS)
    assert checkpoint is not None, "a finished run has validated at its last step"
    shutil.copyfile(checkpoint / MODEL_FILE, draft.directory / MODEL_FILE)
    shutil.copyfile(job.path(tokenize.TABLE) / TOKENIZER_NAME, draft.directory / TOKENIZER_NAME)
    shards, facts = job.manifest(tokenize.TABLE), read_manifest(checkpoint).facts
    speed = training_speed(run_dir / SPOOL_NAME, job.config.pretrain.global_batch_size)
    draft.commit(
        "encoder",
        {
            "rows": job.config.pretrain.num_steps * job.config.pretrain.global_batch_size,
            "best": facts,
            "run_id": run_id,
            "curve": training_curve(run_dir / SPOOL_NAME),
            "speed": speed,
            "parameters": count_parameters(Clue(job.config.pretrain.model, shards.facts["vocab_size"])),
            "vocab_size": shards.facts["vocab_size"],
            "tokenizer_digest": shards.facts["tokenizer_digest"],
        },
    )
    job.console.say(
        f"pretrain: {speed['users_per_s']:,.0f} users/s in the median step, "
        f"{speed['input_wait_fraction']:.1%} of the time spent waiting for input"
    )


def training_curve(spool: Path) -> list[dict[str, Any]]:
    """Points of the last attempt at each step, by step."""
    points = {point["step"]: point for point in SpoolReader(spool).read()}
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


@contextmanager
def _follow(job: Job, run_dir: Path, replay: MlflowReplay) -> Iterator[None]:
    """Shows progress and feeds MLflow from the spool while the block runs. Neither can hold up training."""
    stop = threading.Event()
    reader = SpoolReader(run_dir / SPOOL_NAME)
    config = job.config.pretrain

    def follow() -> None:
        validation, first_step = "", None
        with job.console.progress("pretrain", "users") as advance:
            while not stop.wait(POLL_INTERVAL_S):
                for point in reader.read():
                    metrics, step = point["metrics"], point["step"]
                    if first_step is None:
                        first_step = step
                    if "val/loss" in metrics:
                        validation = f", val {metrics['val/loss']:.3f}, recall@10 {metrics['val/recall_at_10']:.3f}"
                    note = f"loss {metrics['train/loss']:.3f}{validation}"
                    advance(step, config.num_steps, (step - first_step + 1) * config.global_batch_size, note)
                replay.try_flush()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
