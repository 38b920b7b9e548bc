"""TERACON: relation-aware soft masks, and retention of past tasks by pseudo-labels on sampled users.

Source: Kim et al., KDD 2023 (arXiv 2306.01792), and Sein-Kim/TERACON@b48e074. Where they
differ the code is followed: a past task is rehearsed under its own mask, masks of all other known tasks take part, and
relation maps are made anew for every task.
Differs from the code: on average B rho users of a batch rehearse a past task, at least one (there int(B rho), which is
0 for B < 405, and retention is silently off); masks have a learning rate of their own; a `next_item` task does not
train on pads; masks at the end are those that were trained (there task 1 is tested with its plain mask after task 2).

Legend: `B` users, `K` mask points, `D` width, `C` classes.
"""

import copy
import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from userrep.config import Config
from userrep.continual.masks import MAX_SCALE, RelationMasks, TaskEmbeddings, annealed_scale, gate
from userrep.continual.method import Method, Progress
from userrep.continual.network import Network, TaskSpec
from userrep.losses.retention import RELATION_SCALE, retention_loss, sampling_rate

FIRST_RATE = 0.9  # of the first batch of a task, before there are masks to compare
MIN_RATE = 1 - 1 / (1 + math.exp(-RELATION_SCALE))  # where all masks are the same


class TeraconConfig(Config):
    """Options of TERACON; the defaults are those of the official code where it has them."""

    retention_weight: float = Field(default=0.7, ge=0)  # alpha
    max_scale: float = Field(default=MAX_SCALE, gt=1)
    # Of embeddings and relation maps. Embeddings start in [0, 2], so nearly all masks are open; to close one, Adam has
    # to go a way of about 1, and goes at most one learning rate per step. With this one, sampling rates on ml1m are
    # those of the paper, .007 to .08. Differs: the code has the task's learning rate, and tens of thousands of steps.
    mask_learning_rate: float = Field(default=0.1, gt=0)
    # Users on which a past task is rehearsed: by relation (Eq. 15), as few as there can be, or all of them.
    sampling: Literal["relation", "minimum", "all"] = "relation"
    # annealed: the teacher's masks harden in every epoch like the student's; fixed: its final masks, so its answers
    # are the same in every epoch. It then encodes a user once per past task (on every rank that meets the user), and
    # keeps D numbers, and some 700 bytes, for each. A vector is that of the batch in which the user was first met; in
    # another batch it might be rounded otherwise.
    teacher_scale: Literal["annealed", "fixed"] = "annealed"
    with_pads: bool = False  # train `next_item` on pads too, as the official code does


class Teracon(Method):
    """One shared network, all of which every task may change, and a frozen copy of it as the teacher."""

    def __init__(self, network: Network, config: TeraconConfig) -> None:
        super().__init__(network)
        self.config, self.mask_learning_rate = config, config.mask_learning_rate
        self.embeddings = TaskEmbeddings(network.backbone.num_points, network.backbone.dim)
        self.relations: RelationMasks | None = None  # the first task has a plain mask
        self.teacher: Teracon | None = None
        self.rates: list[float] = []
        self._known: list[dict[int, torch.Tensor]] = []  # user vectors of the teacher, by past task and row

    def begin_task(self, task: TaskSpec) -> None:
        """Freezes a copy of what is known so far; the new task gets a head, embeddings, and all tasks relation maps."""
        if self.network.tasks:
            self.end_task()  # only the last teacher counts
            shared = {id(buffer): buffer for buffer in self.network.backbone.buffers()}  # large, and never trained
            self.teacher = copy.deepcopy(self, shared).requires_grad_(False)
        super().begin_task(task)
        self.embeddings.add(like=next(self.network.parameters()))
        if self.teacher is not None:
            self.relations = RelationMasks(self.embeddings)
        rate = {"relation": FIRST_RATE, "minimum": MIN_RATE, "all": 1.0}[self.config.sampling]
        self.rates = [rate] * self.current
        self._known = [{} for _ in self.rates]

    def mask_parameters(self) -> Iterable[nn.Parameter]:
        """Task embeddings and relation maps."""
        yield from self.embeddings.parameters()
        if self.relations is not None:
            yield from self.relations.parameters()

    def masks(self, number: int, scale: float) -> torch.Tensor:
        """Masks of a task, (K, D); all open of the vector itself."""
        if self.network.tasks[number].kind == "vector":
            return torch.ones_like(self.embeddings.tasks[number])
        if self.relations is None:
            return self.embeddings.plain(number, scale)
        return self.relations(self.embeddings, number, scale)

    def loss(
        self, items_BL: torch.Tensor, labels_B: torch.Tensor, progress: Progress
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Cross-entropy of the current task plus alpha times the retention of all past ones."""
        scale = annealed_scale(progress.step, progress.num_steps, self.config.max_scale)
        masks_KD = self.masks(self.current, scale)
        loss = self.network.loss(items_BL, labels_B, self.current, gate(masks_KD), self.config.with_pads)
        if self.teacher is None or self.config.retention_weight == 0:
            return loss, {}
        rates = loss.new_tensor(self.rates)
        errors = torch.stack(
            [
                self._error(items_BL[chosen], None if progress.rows is None else progress.rows[chosen], past, scale)
                for past, chosen in enumerate(self._sample(len(items_BL)))
            ]
        )
        retention = retention_loss(errors, rates)
        facts = {"train/task_loss": loss.item(), "train/retention": retention.item(), "train/rate": rates.mean().item()}
        if self.config.sampling == "relation":
            self._update_rates(masks_KD, scale)
        return loss + self.config.retention_weight * retention, facts

    def after_step(self) -> None:
        """Clamps the task embeddings."""
        self.embeddings.clamp()

    def vectors(self, items_BL: torch.Tensor, number: int) -> torch.Tensor:
        """Of a task under its hardest masks, (B, D)."""
        return self.network.vectors(items_BL, number, gate(self.final_masks(number)))

    def final_masks(self, number: int) -> torch.Tensor:
        """Masks of a task at the largest scale, (K, D)."""
        return self.masks(number, self.config.max_scale)

    def end_task(self) -> None:
        """Lets the teacher go, and what is known of it."""
        self.teacher, self._known = None, []

    def _error(self, items_BL: torch.Tensor, rows_B: torch.Tensor | None, past: int, scale: float) -> torch.Tensor:
        taught_BC = self._taught(items_BL, rows_B, past, self._teacher_scale(scale))
        error = F.mse_loss(self.network.logits(items_BL, past, gate(self.masks(past, scale))), taught_BC)
        # Logits are in nats; a vector has no unit, so its error is relative to its size.
        return error / taught_BC.square().mean() if self.network.tasks[past].kind == "vector" else error

    @torch.no_grad()
    def _taught(self, items_BL: torch.Tensor, rows_B: torch.Tensor | None, past: int, scale: float) -> torch.Tensor:
        """The teacher's logits, (B, C). Vectors are kept, not logits: there may be a million classes."""
        assert self.teacher is not None
        network, adapt = self.teacher.network, gate(self.teacher.masks(past, scale))
        if rows_B is None or self.config.teacher_scale == "annealed":
            return network.logits(items_BL, past, adapt)
        known, rows = self._known[past], rows_B.tolist()
        if places := {row: place for place, row in enumerate(rows) if row not in known}:
            vectors_BD = network.vectors(items_BL[list(places.values())], past, adapt)
            known.update(zip(places, vectors_BD, strict=True))
        return network.heads[past](torch.stack([known[row] for row in rows]))

    def _sample(self, size: int) -> list[torch.Tensor]:
        """Rows of the batch on which each past task is rehearsed, each drawn on its own.

        There are size * rate of them on average: what is left of a row counts as one with that probability.
        """
        counts = (math.floor(size * rate + torch.rand(()).item()) for rate in self.rates)
        return [torch.randperm(size)[: max(1, count)] for count in counts]

    @torch.no_grad()
    def _update_rates(self, masks_KD: torch.Tensor, scale: float) -> None:
        """Rates of the next batch, from the masks of this one."""
        assert self.teacher is not None
        scale = self._teacher_scale(scale)
        self.rates = [sampling_rate(masks_KD, self.teacher.masks(past, scale)).item() for past in range(self.current)]

    def _teacher_scale(self, scale: float) -> float:
        return scale if self.config.teacher_scale == "annealed" else self.config.max_scale
