"""Checkpoints: safetensors + JSON, written aside, fsynced, checksummed, committed by one rename. Never pickle.

In object storage they are committed by the upload of their manifest, and a restart needs nothing of the node before.

A checkpoint is a directory `step-00000123-attempt-0002`, which never changes. `state.json` is what is restored;
`manifest.json` repeats it for readers, with the checksums of all other files.
"""

import json
import math
import os
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from userrep import storage
from userrep.manifest import (
    FileEntry,
    IncompleteTableError,
    Manifest,
    describe_file,
    read_manifest,
    staged_directory,
    verify_files,
    write_manifest,
)
from userrep.models.clue import Clue, ClueConfig
from userrep.training.fence import Attempt
from userrep.training.state import TrainState

CHECKPOINTS = "checkpoints"  # in the run directory
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
DAMAGED, REMOVED = "damaged-", ".removed-"  # prefixes of names
BEST_METRIC = "val/recall_at_10"


class CheckpointMismatchError(ValueError):
    """A checkpoint does not belong to the model that should be restored from it."""


@dataclass
class Snapshot:
    """A copy of a state in this process's memory, which later steps do not change."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    progress: dict[str, Any]

    @classmethod
    def take(cls, state: TrainState, reuse: "Snapshot | None" = None) -> "Snapshot":
        """Copies a state; into the memory of an earlier snapshot of the same run, if there is one."""
        model, optimizer = state.model.state_dict(), _flatten_optimizer(state.optimizer)
        return cls(
            _copy(model, reuse.model if reuse else {}),
            _copy(optimizer, reuse.optimizer if reuse else {}),
            state.progress(),
        )


def write_checkpoint(
    directory: Path, snapshot: Snapshot, config: dict[str, Any], metrics: dict[str, float], keep: int, attempt: Attempt
) -> Path:
    """Commits a checkpoint under `directory`, then removes all but the newest `keep` and the best one.

    Args:
        directory: the run's checkpoint directory.
        snapshot: what to save.
        config: resolved config of the run, kept in the manifest.
        metrics: of the step; with `val/recall_at_10`, the checkpoint may be the best one.
        keep: newest checkpoints to retain, >= 1.
        attempt: must be the newest one when the checkpoint is committed.

    Raises:
        StaleAttemptError: it is not; nothing was committed.
        OSError: storage failed; nothing was committed.
    """
    target = directory / f"step-{snapshot.progress['step']:08d}-attempt-{attempt.number:04d}"
    with staged_directory(target) as staging:
        save_file(snapshot.model, staging / MODEL_FILE)
        save_file(snapshot.optimizer, staging / OPTIMIZER_FILE)
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}  # NaN is no JSON
        state = {**snapshot.progress, "metrics": finite, "config": config}
        (staging / STATE_FILE).write_text(json.dumps(state))
        names = (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE)
        for name in names:
            _sync(staging / name)
        write_manifest(staging, _manifest(state, tuple(describe_file(staging, staging / name) for name in names)))
        _sync(staging)
        attempt.check()
    _sync(directory)
    storage.push(target, attempt.check)
    best = _best(list_checkpoints(directory))
    for old in list_checkpoints(directory)[:-keep]:
        if old != best:
            attempt.check()
            storage.remove(old)
    return target


def restore_snapshot(snapshot: Snapshot, state: TrainState) -> None:
    """Makes a state what it was when the snapshot was taken, in place."""
    state.model.load_state_dict(snapshot.model)
    # Copies: the optimizer would go on with the snapshot's own tensors.
    _unflatten_optimizer(snapshot.optimizer, state.optimizer)
    state.set_progress(snapshot.progress)


def restore_checkpoint(checkpoint: Path, state: TrainState) -> None:
    """Loads a verified checkpoint into `state`, in place."""
    storage.fetch(checkpoint)
    load_model(checkpoint / MODEL_FILE, state.model)
    _unflatten_optimizer(load_file(checkpoint / OPTIMIZER_FILE), state.optimizer)
    state.set_progress(json.loads((checkpoint / STATE_FILE).read_text()))


def load_model(path: Path, model: torch.nn.Module) -> None:
    """Loads weights into a model of the same shape.

    Raises:
        CheckpointMismatchError: names or shapes differ.
    """
    try:
        model.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise CheckpointMismatchError(f"{path} does not fit the configured model: {error}") from error


def load_encoder(directory: Path) -> Clue:
    """The encoder of a committed encoder table, in evaluation mode."""
    manifest = read_manifest(directory)
    model = Clue(ClueConfig.parse(manifest.config["model"]), manifest.facts["vocab_size"])
    load_model(directory / MODEL_FILE, model)
    return model.eval()


def list_checkpoints(directory: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return [path for path, is_committed in storage.directories(directory, "step-*").items() if is_committed]


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is intact; damaged ones are passed over with a warning."""
    return next((path for path in reversed(list_checkpoints(directory)) if _is_intact(path)), None)


def recover_checkpoint(directory: Path) -> Path | None:
    """As `latest_checkpoint`; puts what is newer aside, and removes what killed attempts had not committed.

    A damaged checkpoint would otherwise count among the newest that are kept, and push out the ones that replace it. It
    stays on disk, for people: what cannot be read here and now may not be lost. Call it when no other attempt may
    write.
    """
    latest = latest_checkpoint(directory)
    checkpoints = list_checkpoints(directory)
    for damaged in checkpoints[checkpoints.index(latest) + 1 :] if latest else checkpoints:
        storage.rename(damaged, damaged.with_name(f"{DAMAGED}{time.time_ns()}-{damaged.name}"))
    for path in [*directory.glob(".step-*"), *directory.glob(f"{REMOVED}*")]:
        shutil.rmtree(path)
    storage.remove_uncommitted(directory, "step-*")
    return latest


def checkpoint_step(checkpoint: Path | None) -> int:
    """Steps taken when the checkpoint was written; 0 without one."""
    return 0 if checkpoint is None else int(storage.manifest_of(checkpoint).facts["step"])


def best_checkpoint(directory: Path) -> Path | None:
    """The intact checkpoint with the highest validation recall at 10 (the newest of equals).

    Not the one with the lowest validation loss: where users are few, the loss rises with the confidence of the model
    long before retrieval stops getting better (pipelines/records/LOG.md, yelp2019).
    """
    return _best([path for path in list_checkpoints(directory) if _is_intact(path)])


def _best(checkpoints: list[Path]) -> Path | None:
    recalls = {path: recall for path in reversed(checkpoints) if (recall := _recall(path)) is not None}
    return max(recalls, key=lambda path: recalls[path], default=None)


def _recall(checkpoint: Path) -> float | None:
    try:
        return float(storage.manifest_of(checkpoint).facts["metrics"][BEST_METRIC])
    except (IncompleteTableError, KeyError, TypeError, ValueError):  # not validated, or damaged
        return None


def _is_intact(checkpoint: Path) -> bool:
    try:
        manifest = read_manifest(storage.fetch(checkpoint))
        verify_files(checkpoint, manifest)
        # The manifest has no checksum of its own, but says nothing that a file with a checksum does not say.
        if manifest != _manifest(json.loads((checkpoint / STATE_FILE).read_text()), manifest.files):
            raise IncompleteTableError(f"{checkpoint}: its manifest and its {STATE_FILE} differ")
    except IncompleteTableError as error:  # not OSError: what cannot be read now may be intact
        warnings.warn(f"checkpoint passed over: {error}", stacklevel=3)
        return False
    return True


def _manifest(state: dict[str, Any], files: tuple[FileEntry, ...]) -> Manifest:
    facts = {name: value for name, value in state.items() if name != "config"}
    return Manifest(table="checkpoint", stage="pretrain", config=state["config"], files=files, facts=facts)


def _sync(path: Path) -> None:
    """Returns when the disk has the file, or the entries of the directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(values: dict[str, torch.Tensor], reuse: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    copies = {}
    for name, value in values.items():
        target = reuse.get(name)
        if target is None:
            target = torch.empty(value.shape, dtype=value.dtype)
        copies[name] = target.copy_(value.detach())
    return copies


def _flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """State tensors as `index.name`; hyper-parameters are not state, they come from the config."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
    }


def _unflatten_optimizer(tensors: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        # Not the mapped file itself, whose content would change under the run where the file is damaged.
        state.setdefault(int(index), {})[name] = tensor.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
