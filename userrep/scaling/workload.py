"""What a training step of a cell will compute and hold in memory, from batches that are drawn from the real table.

Neither the encoder nor its activations are made: chunks are planned by the planner of training on fake tensors, which
have shapes alone. A single worker is assumed; several deduplicate the items of their own users only.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from userrep.data.augment import AugmentConfig, draw_events, drop_tokens
from userrep.data.batch import UserBatch
from userrep.data.views import (
    RowGroup,
    Samples,
    ViewKind,
    build_batch,
    list_samples,
    manifest_row_groups,
    merge_row_groups,
    read_row_group,
)
from userrep.models.clue import Clue, ClueConfig
from userrep.models.cost import StepShape, parameter_counts
from userrep.training.encoding import COPIES_OF_VECTORS, ChunkPlan, MemoryConfig, MemoryPlanner
from userrep.training.objective import LossConfig, Precision, step_shape

# Users of the batches that a mean step is taken over, of which there are two at least: cost per user has a deviation of
# .4 of its mean (heavy-tailed histories of tests/scaling/test_workload.py), so the mean is right to 1%.
SAMPLED_USERS = 2048
BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, float32 each


@dataclass(frozen=True)
class Workload:
    """The mean training step of a run.

    Attributes:
        shape: what it computes on.
        memory_bytes: weights, gradients, optimizer, activations that are held for the backward pass, and vectors.
    """

    shape: StepShape
    memory_bytes: float


# (encoder, global batch size, most events of a view) -> the mean step.
WorkloadOf = Callable[[ClueConfig, int, int], Workload]


class TableWorkloads:
    """Workloads of runs on a tokenized table, as a `WorkloadOf`. Batches of a size are drawn once for all encoders."""

    def __init__(
        self,
        group: RowGroup,
        samples: Samples,
        vocab_size: int,
        augment: AugmentConfig,
        loss: LossConfig | None = None,
        memory: MemoryConfig | None = None,
        precision: Precision = "float32",
        seed: int = 0,
    ) -> None:
        """Args: group and samples as `read_samples` gives them; the rest is what the runs will be configured with."""
        self._group, self._samples, self._vocab_size = group, samples, vocab_size
        self._augment, self._loss, self._memory = augment, loss or LossConfig(), memory or MemoryConfig()
        self._precision, self._seed = precision, seed
        self._batches: dict[tuple[int, int], list[UserBatch]] = {}

    def __call__(self, model: ClueConfig, global_batch_size: int, max_events: int) -> Workload:
        """The mean step of an encoder.

        Raises:
            ValueError: fewer samples than a batch were read.
        """
        batches = self._draw(global_batch_size, max_events)
        plans, bytes_per_position = self._plan(model, batches)
        shape = StepShape.mean(
            [step_shape(batch, plan, self._loss) for batch, plan in zip(batches, plans, strict=True)]
        )
        positions = shape.items.positions + shape.histories.positions
        # One chunk more than is kept: the one that is computed again.
        held = min(positions, max((plan.num_kept + 1) * plan.chunk_size for plan in plans))
        vectors = COPIES_OF_VECTORS * 4 * model.dim * (shape.items.count + shape.histories.count)
        parameters = BYTES_PER_PARAMETER * parameter_counts(model, self._vocab_size)["total"]
        return Workload(shape, parameters + held * bytes_per_position + vectors)

    def _draw(self, size: int, max_events: int) -> list[UserBatch]:
        if (size, max_events) not in self._batches:
            if size > len(self._samples.users):
                raise ValueError(
                    f"a batch of {size} users cannot be drawn from the {len(self._samples.users)} samples that were "
                    "read: read more of the table, or choose smaller batches"
                )
            augment = self._augment.model_copy(update={"max_events": max_events})
            rng = np.random.default_rng(np.random.SeedSequence([self._seed, size, max_events]))
            num_batches = max(2, -(-SAMPLED_USERS // size))
            self._batches[size, max_events] = [self._one(size, augment, rng, n) for n in range(num_batches)]
        return self._batches[size, max_events]

    def _one(self, size: int, augment: AugmentConfig, rng: np.random.Generator, number: int) -> UserBatch:
        samples = self._samples.take(rng.permutation(len(self._samples.users))[:size])
        drop = partial(drop_tokens, probability=augment.token_drop, seed=number) if augment.token_drop else None
        return build_batch(self._group, samples, draw_events(samples, augment, rng), number, drop)

    def _plan(self, config: ClueConfig, batches: Sequence[UserBatch]) -> tuple[list[ChunkPlan], float]:
        with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16, enabled=self._precision == "bfloat16"):
            planner = MemoryPlanner(Clue(config, self._vocab_size), self._memory)
            return [planner.plan(batch) for batch in batches], planner.bytes_per_position


def read_samples(
    directory: Path, shards: list[dict[str, Any]], kinds: tuple[ViewKind, ...], size: int
) -> tuple[RowGroup, Samples]:
    """The first row groups of a table that hold `size` training samples between them, or all if they do not.

    Args:
        directory: of the table.
        shards: shard facts of its manifest.
        kinds: of views.
        size: samples; several times the largest batch, so that batches differ.
    """
    groups, num_samples = [], 0
    for shard, number, counts in manifest_row_groups(shards):
        if num_samples >= size:
            break
        groups.append(read_row_group(directory, shard, number))
        num_samples += sum(counts["train"][kind] for kind in kinds)
    merged, _ = merge_row_groups(groups)
    return merged, list_samples(merged, kinds, "train")
