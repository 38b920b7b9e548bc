"""Checkpoints: safetensors + JSON, written aside, checksummed, committed by one rename. Never pickle."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from userrep.manifest import (
    IncompleteTableError,
    Manifest,
    describe_file,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.training.state import TrainState

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"


class CheckpointMismatchError(ValueError):
    """A checkpoint does not belong to the model that should be restored from it."""


def save_checkpoint(
    directory: Path, state: TrainState, config: dict[str, Any], metrics: dict[str, float], keep: int
) -> Path:
    """Commits `step-00000123/` under `directory`, then removes all but the newest `keep` and the best one.

    Args:
        directory: the run's checkpoint directory.
        state: what to save.
        config: resolved config of the run, kept in the manifest.
        metrics: must hold `val/recall_at_10`, by which the best checkpoint is known.
        keep: newest checkpoints to retain, >= 1.
    """
    target = directory / f"step-{state.step:08d}"
    with staged_directory(target) as staging:
        save_file(_tensors(state.model.state_dict()), staging / MODEL_FILE)
        save_file(_flatten_optimizer(state.optimizer), staging / OPTIMIZER_FILE)
        (staging / STATE_FILE).write_text(json.dumps(state.progress()))
        files = tuple(describe_file(staging, staging / name) for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE))
        facts = {**state.progress(), "metrics": metrics}
        write_manifest(staging, Manifest(table="checkpoint", stage="pretrain", config=config, files=files, facts=facts))
    best = best_checkpoint(directory)
    for old in list_checkpoints(directory)[:-keep]:
        if old != best:
            shutil.rmtree(old)
    return target


def restore_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Loads a verified checkpoint into `state`, in place."""
    load_model(checkpoint / MODEL_FILE, state.model)
    _unflatten_optimizer(load_file(checkpoint / OPTIMIZER_FILE), state.optimizer)
    progress = json.loads((checkpoint / STATE_FILE).read_text())
    state.step, state.samples_seen, state.batch_hash = (
        progress["step"],
        progress["samples_seen"],
        progress["batch_hash"],
    )


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Loads weights into a model of the same shape.

    Raises:
        CheckpointMismatchError: names or shapes differ.
    """
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{path} does not fit the configured model: {error}") from error


def list_checkpoints(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path.parent for path in directory.glob("step-*/manifest.json"))


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint whose files match their checksums; damaged ones are passed over with a warning."""
    for checkpoint in reversed(list_checkpoints(directory)):
        try:
            verify_files(checkpoint, read_manifest(checkpoint))
        except IncompleteTableError as error:
            warnings.warn(f"checkpoint passed over: {error}", stacklevel=2)
            continue
        return checkpoint
    return None


def checkpoint_step(checkpoint: Path | None) -> int:
    """Steps taken when the checkpoint was written; 0 without one."""
    return 0 if checkpoint is None else int(read_manifest(checkpoint).facts["step"])


def best_checkpoint(directory: Path) -> Path | None:
    """The checkpoint with the highest validation recall at 10 (the newest of equals).

    Not the one with the lowest validation loss: where users are few, the loss rises with the confidence of the model
    long before retrieval stops getting better (pipelines/records/LOG.md, yelp2019).
    """
    checkpoints = list_checkpoints(directory)
    return max(
        reversed(checkpoints), key=lambda path: read_manifest(path).facts["metrics"]["val/recall_at_10"], default=None
    )


def _tensors(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in values.items()}


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State tensors as `index.name`; hyper-parameters are not state, they come from the config."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value).cpu()
        for index, entry in state.items()
        for name, value in entry.items()
    }


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
