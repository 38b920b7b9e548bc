"""Stage `finetune`: `shards/` and the table of a pretrained Recformer -> `finetuned/`, for next-item recommendation.

Users and catalogue are those of the job, whose shards must be tokenized as the encoder's were. The stage trains in this
process, without Ray: a batch is small, and the item matrix belongs to all steps of an epoch. A finished seed is
committed to `finetune/<hash>/`, so an interrupted stage goes on with the next one; a seed itself begins anew.
"""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from pipelines import tokenize
from pipelines.job import Draft, Job
from userrep.config import ConfigError, digest_json
from userrep.data.leave_one_out import LeaveOneOut, load_leave_one_out
from userrep.data.next_item_samples import SequenceReader
from userrep.data.tokenizer import TOKENIZER_NAME, TokenizerMismatchError, check_digest
from userrep.evaluation.next_item_ranking import METRICS, summarize
from userrep.evaluation.transfer import mean_interval
from userrep.manifest import MANIFEST_NAME, IncompleteTableError, read_manifest, staged_directory, verify_files
from userrep.models.recformer import Recformer
from userrep.training.checkpoint import MODEL_FILE
from userrep.training.finetune import Epoch, FinetuneConfig, Finetuned, finetune, open_reader
from userrep.training.finetune_evaluation import evaluate
from userrep.training.recformer_table import load_recformer

TABLE = "finetuned"
SEEDS = "finetune"  # directory of the seeds that are finished
ITEM_MATRIX_FILE = "item_matrix.safetensors"  # one tensor, `items` (I, D), in the order of ITEMS_FILE
ITEMS_FILE = "items.parquet"  # item_id
USERS_FILE = "users.parquet"  # of every asked user its id, whether its test item is cold, and its metrics of the test


def run(
    job: Job, encoder: Path, config: FinetuneConfig, seeds: Sequence[int] = (0,), table: str = TABLE
) -> dict[str, Any]:
    """Runs the stage.

    Args:
        job: of the target data; ingested, and tokenized as the encoder was.
        encoder: table of the pretrained model.
        config: how; its seed is replaced.
        seeds: a model is fine-tuned for each. Of zero-shot there is only one result.
        table: name of the table that is written.

    Returns:
        The facts of the table.

    Raises:
        ConfigError: no Recformer, items without keys, or limits beyond the model's.
        TokenizerMismatchError: the shards were tokenized otherwise.
        IncompleteTableError: shards or encoder are not there.
    """
    encoder = encoder.resolve()
    check_inputs(job, encoder)
    seeds = (0,) if config.is_zero_shot else tuple(dict.fromkeys(seeds))
    if not seeds:
        raise ConfigError("no seed is given, so nothing would be trained: name at least one, e.g. --seeds 0")
    resolved = config.model_copy(update={"seed": 0}).model_dump(mode="json")
    inputs = (tokenize.TABLE, str(encoder))
    job.run_stage(
        "finetune",
        table,
        {"finetune": resolved, "seeds": list(seeds)},
        inputs,
        partial(_write, job, encoder, config, seeds),
    )
    return job.manifest(table).facts


def check_inputs(job: Job, encoder: Path) -> None:
    """Raises what `run` raises of its inputs."""
    theirs, ours = read_manifest(encoder).facts, job.manifest(tokenize.TABLE).facts
    path = job.path(tokenize.TABLE)
    form = json.dumps(theirs.get("attributes") or {})
    how = (
        f"`userrep tokenize` with --set tokenize.name={encoder / TOKENIZER_NAME}, --set 'tokenize.attributes={form}', "
        "and tokenize.max_tokens of the encoder's job"
    )
    if not ours.get("has_keys"):
        raise ConfigError(
            f"{path} holds plain texts, and Recformer reads attributes with keys: run `userrep ingest` with --set "
            f"source.keep_attributes=true, then run {how}"
        )
    try:
        check_digest(theirs.get("tokenizer_digest", "none"), ours["tokenizer_digest"], str(path))
    except TokenizerMismatchError as error:
        raise TokenizerMismatchError(f"{error}. Here: run {how}") from error


def _write(job: Job, encoder: Path, config: FinetuneConfig, seeds: Sequence[int], draft: Draft) -> None:
    torch.set_num_threads(job.config.workers.threads or torch.get_num_threads())
    data = load_leave_one_out(job.path(tokenize.TABLE), job.manifest(tokenize.TABLE).facts["shards"])
    found: dict[str, Any] = {}
    for seed in seeds:
        own = config.model_copy(update={"seed": seed})
        name = digest_json({"config": own.model_dump(mode="json"), "inputs": draft.inputs})
        directory = job.workdir / SEEDS / name
        if (facts := _finished(directory)) is None:
            with staged_directory(directory) as staging:
                _run_seed(
                    job, encoder, own, data, Draft(staging, "finetune", own.model_dump(mode="json"), draft.inputs)
                )
            facts = read_manifest(directory).facts
        found[str(seed)] = facts
        shutil.copytree(directory, draft.directory / f"seed-{seed}", ignore=shutil.ignore_patterns(MANIFEST_NAME))
    shutil.copyfile(encoder / TOKENIZER_NAME, draft.directory / TOKENIZER_NAME)
    pq.write_table(pa.table({"item_id": data.item_ids}), draft.directory / ITEMS_FILE)
    over_seeds = {held: _over_seeds([facts[held] for facts in found.values()]) for held in ("validation", "test")}
    draft.commit(
        "finetuned",
        {
            "rows": len(data.asked),
            "users": len(data),
            "items": data.num_items,
            "tokenizer_digest": read_manifest(encoder).facts["tokenizer_digest"],
            "model": found[str(seeds[0])]["model"],
            "seeds": found,
            **over_seeds,
        },
    )
    for part, values in over_seeds["test"].items():
        shown = ", ".join(f"{metric} {_shown(values[metric])}" for metric in METRICS if metric in values)
        job.console.say(f"finetune: test, {part}: {values['num_users']:,} users, {shown}")


def _finished(directory: Path) -> dict[str, Any] | None:
    """Facts of a finished seed; None where there is none, or a damaged one."""
    try:
        manifest = read_manifest(directory)
        verify_files(directory, manifest)
    except IncompleteTableError:
        return None
    return manifest.facts


def _run_seed(job: Job, encoder: Path, config: FinetuneConfig, data: LeaveOneOut, draft: Draft) -> None:
    model, vocabulary = load_recformer(encoder)
    model.to("cuda" if job.config.workers.use_gpu else "cpu")
    reader = open_reader(data, model.config, vocabulary.cls_id, config)
    with job.console.progress(f"finetune: seed {config.seed}", "evaluations") as advance:
        done = finetune(model, reader, config, _reporter(job, config, advance), job.config.workers.memory)
    save_file(model.state_dict(), draft.directory / MODEL_FILE)
    save_file({"items": done.item_matrix.contiguous()}, draft.directory / ITEM_MATRIX_FILE)
    _commit_seed(model, done, reader, config, draft)


def _commit_seed(
    model: Recformer, done: Finetuned, reader: SequenceReader, config: FinetuneConfig, draft: Draft
) -> None:
    """Asks validation and test, and commits what was found; cold are items that no user of the share has trained on."""
    data, found = reader.data, {}
    users = data.train_share(config.share, config.share_seed)
    for held in ("validation", "test"):
        values = evaluate(model, done.item_matrix, reader, held)
        is_cold = data.is_cold(held, users)
        found[held] = summarize(values, {"in_set": ~is_cold, "cold": is_cold})
    columns = {"user_id": data.user_ids.take(pa.array(data.asked)), "is_cold": is_cold, **values}  # of the test
    pq.write_table(pa.table(columns), draft.directory / USERS_FILE)
    draft.commit(
        "finetuned_seed",
        {
            "model": model.config.model_dump(mode="json"),
            "train_users": done.num_train_users,
            "epochs": [asdict(epoch) for epoch in done.epochs],
            "best": asdict(next(epoch for epoch in reversed(done.epochs) if epoch.is_best)),
            "seconds": round(sum(epoch.seconds for epoch in done.epochs), 1),
            **found,
        },
    )


def _reporter(job: Job, config: FinetuneConfig, advance: Any) -> Any:
    planned = [stage.max_epochs for stage in (config.moving, config.frozen) if stage is not None]
    total, best = max(1, sum(planned)), 0.0

    def report(epoch: Epoch) -> None:
        nonlocal best
        best = max(best, epoch.ndcg_at_10)
        before = config.moving.max_epochs if epoch.stage == "frozen" and config.moving is not None else 0
        loss = "" if epoch.loss is None else f", loss {epoch.loss:.3f}"
        note = f"{epoch.stage} {epoch.number}{loss}, val NDCG@10 {epoch.ndcg_at_10:.4f}, best {best:.4f}"
        advance(before + epoch.number, total, before + epoch.number, note)
        if job.console.is_verbose:
            job.console.say(f"finetune: seed {config.seed}, {note}")

    return report


def _over_seeds(found: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """By slice: `num_users`, and by metric mean and 95% interval over seeds, None for that of a single seed."""
    summary: dict[str, dict[str, Any]] = {}
    for part, first in found[0].items():
        summary[part] = {"num_users": first["num_users"]}
        for metric in METRICS if first["num_users"] else ():
            interval = mean_interval(np.array([of_seed[part][metric]["mean"] for of_seed in found]))
            low, high = (None if math.isnan(end) else float(end) for end in (interval.low, interval.high))
            summary[part][metric] = {"mean": float(interval.mean), "low": low, "high": high}
    return summary


def _shown(value: dict[str, Any]) -> str:
    interval = "" if value["low"] is None else f" [{value['low']:.4f}, {value['high']:.4f}]"
    return f"{value['mean']:.4f}{interval}"
