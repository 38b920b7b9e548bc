"""An encoder table whose weights are far from their start, and cells that go on from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from tests.support.tiny_cell import NUM_ITEMS, ORDER, SPLIT, tiny_cell, tiny_tasks
from userrep.data.tasks import TaskSet, split_samples, vector_task
from userrep.data.tokenizer import TOKENIZER_NAME, TokenizeConfig, build_tokenizer
from userrep.manifest import Manifest, describe_file, write_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.training.backbones import EncoderTable, PretrainedClue
from userrep.training.cells import Cell
from userrep.training.checkpoint import MODEL_FILE

MODEL = ClueConfig(dim=8, num_heads=2, item_layers=1, service_layers=1, max_tokens=5)
KINDS = ("blue", "red shoe and a blue hat", "hat", "very long")
# Short, longer than what the encoder reads of one, and one with nothing in it.
TEXTS = ("", *("" if number == 3 else f"{KINDS[number % 4]} {number // 2}" for number in range(1, NUM_ITEMS)))


def shake(model: torch.nn.Module, seed: int = 0) -> None:
    """Moves all parameters away from where they start, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data += 0.3 * noise.to(parameter.dtype)


def write_encoder(directory: Path, seed: int = 0) -> Clue:
    """A committed encoder table. Returns its model."""
    directory.mkdir(parents=True)
    tokenizer = build_tokenizer(TokenizeConfig(vocab_size=280, max_tokens=6), TEXTS)
    tokenizer.save(str(directory / TOKENIZER_NAME))
    torch.manual_seed(seed)
    model = Clue(MODEL, tokenizer.get_vocab_size())
    shake(model, seed)
    save_file(model.state_dict(), directory / MODEL_FILE)
    files = tuple(describe_file(directory, directory / name) for name in (MODEL_FILE, TOKENIZER_NAME))
    config, facts = {"model": MODEL.model_dump(mode="json")}, {"vocab_size": tokenizer.get_vocab_size()}
    write_manifest(directory, Manifest(table="encoder", stage="pretrain", config=config, files=files, facts=facts))
    return model


def pretrained_tasks() -> TaskSet:
    """Those of `tiny_tasks` with texts, and the user vector in place of the next item."""
    tasks = tiny_tasks()
    sequences = replace(tasks.sequences, texts=TEXTS)
    rows = np.arange(len(sequences.items))
    first = vector_task("T1", sequences, split_samples(rows, sequences.keys, SPLIT))
    return TaskSet(sequences, (first, *tasks.tasks[1:]), {})


def pretrained_cell(encoder: Path, method: str, order: tuple[str, ...] = ORDER, **values: Any) -> Cell:
    """As `tiny_cell`, from an encoder table."""
    cell = tiny_cell(method, order, **values)
    backbone = PretrainedClue(encoder=EncoderTable(path=encoder))
    return cell.model_copy(update={"training": cell.training.model_copy(update={"backbone": backbone})})
