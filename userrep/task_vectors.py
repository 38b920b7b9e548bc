"""User vectors as the tasks of a taught encoder see them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from userrep.continual.catalog import build_method
from userrep.continual.network import TaskSpec
from userrep.data.assemble import NO_TIME
from userrep.data.task_builder import left_padded, places_from_end
from userrep.data.views import RowGroup
from userrep.manifest import read_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.models.clue_backbone import ClueBackbone
from userrep.models.row_stable import RowStable
from userrep.training.cells import METHOD_FILE
from userrep.training.checkpoint import load_model
from userrep.training.encoding import encode_items


class TaskVectors:
    """User vectors as the tasks of a taught encoder see them.

    Attributes:
        tasks: names of the tasks that have vectors of their own, all but the universal one.
        max_items: most recent items of a user that they read.
    """

    def __init__(self, directory: Path) -> None:
        """Args: directory is a committed table of the stage `teach`."""
        manifest = read_manifest(directory)
        specs = [TaskSpec(task["name"], task["kind"], task["num_classes"]) for task in manifest.facts["tasks"]]
        config, choice = ClueConfig.parse(manifest.config["model"]), manifest.config["teach"]["method"]
        self._backbones: list[ClueBackbone] = []
        self._method = build_method(choice["name"], choice["options"], lambda: self._new_backbone(config))
        self._method.make_room(specs)
        load_model(directory / METHOD_FILE, self._method)
        self._method.eval()
        self.max_items = manifest.config["teach"]["max_items"]
        self.tasks = tuple(spec.name for spec in specs[1:])

    @torch.no_grad()
    def encode(self, model: Clue, group: RowGroup) -> dict[str, np.ndarray]:
        """By task one vector per user, float32 (N, D), L2 norm 1; bit for bit the same in any company."""
        items_NL = torch.from_numpy(recent_items(group, self.max_items)).long()
        with RowStable():
            item_UD = encode_items(model, group.tokens, group.token_offsets)
            for backbone in self._backbones:
                backbone.item_VD = torch.cat([torch.zeros_like(item_UD[:1]), item_UD])
            return {
                name: F.normalize(self._method.vectors(items_NL, number), dim=-1).numpy()
                for number, name in enumerate(self.tasks, 1)
            }

    def _new_backbone(self, config: ClueConfig) -> ClueBackbone:
        """One whose item table is that of the row group at hand."""
        self._backbones.append(ClueBackbone(config, torch.zeros(1, config.dim)))
        return self._backbones[-1]


def recent_items(group: RowGroup, max_items: int) -> np.ndarray:
    """The most recent items of every user in all services, left-padded: 1 + reference, int32 (N, max_items).

    As in `data/shard_tasks.py`, but nothing is asked, so nothing is left out: oldest first, events of unknown time
    before all others, then by service.
    """
    counts_H = np.diff(group.history_offsets)
    users_E = np.repeat(np.repeat(np.arange(len(group.keys)), np.diff(group.user_offsets)), counts_H)
    times_E = group.times.fill_null(NO_TIME).to_numpy()
    order = np.lexsort([np.arange(len(users_E)), np.repeat(group.services, counts_H), times_E, users_E])
    order = order[places_from_end(users_E[order]) < max_items]
    return left_padded(users_E[order], group.items[order] + 1, len(group.keys), max_items)
