"""Encoder tables over the tokens of `tests.support.tokenized`, with and without tasks, whose weights are far from
their start."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support.pretrained import shake
from userrep.continual.catalog import build_method
from userrep.continual.network import TaskSpec
from userrep.manifest import Manifest, write_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.models.clue_backbone import ClueBackbone
from userrep.training.cells import METHOD_FILE
from userrep.training.checkpoint import MODEL_FILE

VOCAB, MAX_ITEMS, TOKENIZER = 1010, 5, "t" * 12
TASKS = [
    {"name": "universal", "kind": "vector", "num_classes": 8},
    {"name": "gender", "kind": "label", "num_classes": 2},
    {"name": "age", "kind": "label", "num_classes": 3},
]


def write_clue(directory: Path, dim: int = 8, is_taught: bool = False, seed: int = 0) -> None:
    """A committed table of a CLUE encoder, of TERACON's after two tasks if it is taught."""
    directory.mkdir(parents=True)
    shape = ClueConfig(dim=dim, num_heads=2)
    torch.manual_seed(seed)
    model = Clue(shape, VOCAB)
    shake(model, seed)
    save_file(model.state_dict(), directory / MODEL_FILE)
    config, facts = {"model": shape.model_dump(mode="json")}, {"vocab_size": VOCAB, "tokenizer_digest": TOKENIZER}
    if is_taught:
        method = build_method("teracon", {}, lambda: ClueBackbone(shape, torch.zeros(1, dim)))
        method.make_room([TaskSpec(task["name"], task["kind"], task["num_classes"]) for task in TASKS])
        shake(method, seed)
        save_file({name: value.contiguous() for name, value in method.state_dict().items()}, directory / METHOD_FILE)
        config["teach"] = {"method": {"name": "teracon", "options": {}}, "max_items": MAX_ITEMS}
        facts["tasks"] = TASKS
    write_manifest(directory, Manifest(table="encoder", stage="pretrain", config={**config, "seed": seed}, facts=facts))
