"""Ray Data executes the plan: every task prepares one window, every row is one worker's batch of one step.

The recipe deals exactly: one row per block (`target_max_block_size = 1`) and preserved order let `streaming_split` deal
blocks round robin, so with rows ordered by (step, rank) rank r receives batch r of every step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import DataContext, Dataset, ExecutionOptions

from userrep import storage
from userrep.data.augment import AugmentConfig, draw_events, drop_tokens
from userrep.data.batch import UserBatch, from_table, gather_ranges, to_table
from userrep.data.plan import Plan
from userrep.data.tokenizer import check_digest
from userrep.data.views import (
    PAIR_BASE,
    RowGroup,
    Samples,
    ViewConfig,
    build_batch,
    list_samples,
    merge_row_groups,
    read_row_group,
)
from userrep.manifest import read_manifest

NO_PROGRESS_TIMEOUT_S = 6 * 3600  # Ray Data's default of 30 min also kills a consumer that is merely slow


@dataclass(frozen=True)
class ShardSet:
    """A tokenized table as a source of training samples.

    Attributes:
        directory: of the table; a path that all nodes share.
        shards: shard facts of its manifest.
        weight: share of the source in the samples of a run, > 0; only proportions between sources count.
    """

    directory: Path
    shards: list[dict[str, Any]]
    weight: float = 1.0


def read_shard_sets(sources: Sequence[tuple[Path, float]]) -> list[ShardSet]:
    """The tokenized tables of (directory, weight) pairs, which one model can be trained on together.

    Raises:
        TokenizerMismatchError: two tables were made with different tokenizers.
        IncompleteTableError: a directory holds no committed table.
    """
    manifests = [read_manifest(directory) for directory, _ in sources]
    for (directory, _), manifest in zip(sources[1:], manifests[1:], strict=True):
        check_digest(manifests[0].facts["tokenizer_digest"], manifest.facts["tokenizer_digest"], str(directory))
    pairs = zip(sources, manifests, strict=True)
    return [ShardSet(directory, manifest.facts["shards"], weight) for (directory, weight), manifest in pairs]


@dataclass(frozen=True, eq=False)
class TrainingStream:
    """The batches of a run. Small, since every task gets a copy: 16 bytes for a row group, none for a row.

    User ids mean the same user in all sources. Item ids are one source's own, and so are the groups in which samples
    are contrasted: a negative of another source could be told by its source alone.

    Attributes:
        directories: of the sources.
        shards: shard of each row group, in the plan's numbering, int32 (R,).
        numbers: its number within the shard, int32 (R,).
        views: which samples.
        augment: what is seen of them.
        plan: their order.
    """

    directories: tuple[Path, ...]
    shards: np.ndarray
    numbers: np.ndarray
    views: ViewConfig
    augment: AugmentConfig
    plan: Plan

    def dataset(self, world_size: int, start_step: int = 0) -> Dataset:
        """Batches of steps [start_step, plan.num_steps) for all workers, as one dataset over all remaining epochs.

        Args:
            world_size: number of workers, at most the global batch size; rank r gets samples
                [r * G // world_size, (r + 1) * G // world_size) of every global batch.
            start_step: first step that is still to be taken.

        Raises:
            ValueError: some workers would get no sample.
        """
        if not 1 <= world_size <= self.plan.global_batch_size:
            raise ValueError(
                f"{world_size} workers cannot share a global batch of {self.plan.global_batch_size} users: every "
                "worker needs one, lower workers.num_workers or raise pretrain.global_batch_size"
            )
        # A dataset keeps the context that it was made in; other datasets of this process must not get these settings.
        context = DataContext.get_current().copy()
        context.target_max_block_size = 1
        context.execution_options.preserve_order = True
        context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
        windows = self.plan.windows(start_step)

        def prepare(rows: Any) -> Iterator[Any]:
            yield from self.window_batches(windows[int(rows["id"][0])], world_size, start_step)

        with DataContext.current(context):
            return ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(prepare, batch_size=1)

    def batches(self, start_step: int = 0, rank: int = 0, world_size: int = 1) -> Iterator[UserBatch]:
        """The same batches for one worker, prepared in this process; needs no Ray cluster.

        Args:
            start_step: first step that is still to be taken.
            rank: of the worker.
            world_size: number of workers.
        """
        for window in self.plan.windows(start_step):
            for table in self.window_batches(window, world_size, start_step, range(rank, rank + 1)):
                yield from_table(table)

    def window_batches(
        self, window: int, world_size: int, start_step: int, ranks: range | None = None
    ) -> Iterator[pa.Table]:
        """One-row tables of those steps of a window that are due, ordered by (step, rank); default: of all ranks.

        What is random is drawn for the global batch, before it is cut for the workers: it does not depend on their
        number.
        """
        for directory in self.directories:
            storage.fetch(directory)
        plan, size = self.plan, self.plan.global_batch_size
        row_groups, numbers = plan.samples(window)
        needed = np.unique(row_groups)
        sources = np.searchsorted(plan.first_row_groups, needed, side="right") - 1
        group, first_users = merge_row_groups(
            [self._read(int(index), int(source)) for index, source in zip(needed, sources, strict=True)]
        )
        samples = self._samples(group, first_users, sources)
        # Samples stand in user order, so those of one row group are consecutive.
        first_samples = np.searchsorted(samples.users, first_users)
        order = first_samples[np.searchsorted(needed, row_groups)] + numbers
        first_step = window * plan.window_steps
        for step in range(max(start_step, first_step), min(plan.num_steps, first_step + plan.window_steps)):
            global_samples = samples.take(order[(step - first_step) * size :][:size])
            events = draw_events(global_samples, self.augment, plan.rng(step))
            drop = self.augment.token_drop
            token_filter = partial(drop_tokens, probability=drop, seed=step) if drop else None
            for rank in ranks or range(world_size):
                start, stop = rank * size // world_size, (rank + 1) * size // world_size
                mine = global_samples.take(np.arange(start, stop))
                yield to_table(build_batch(group, mine, events.of_users(start, stop), step, token_filter))

    def _read(self, index: int, source: int) -> RowGroup:
        group = read_row_group(self.directories[source], int(self.shards[index]), int(self.numbers[index]))
        if source == 0:
            return group
        return replace(group, item_ids=pc.binary_join_element_wise(f"source {source}", group.item_ids, ":"))

    def _samples(self, group: RowGroup, first_users: np.ndarray, sources: np.ndarray) -> Samples:
        """All samples of merged row groups; `first_users` and `sources` are those of the parts."""
        samples = list_samples(group, self.views.kinds, "train")
        source = sources[np.searchsorted(first_users, samples.users, side="right") - 1]
        return replace(samples, service_pairs=samples.service_pairs + PAIR_BASE**2 * source)


def open_stream(
    sets: Sequence[ShardSet],
    views: ViewConfig,
    augment: AugmentConfig,
    global_batch_size: int,
    seed: int,
    num_steps: int,
    user_share: float = 1.0,
) -> TrainingStream:
    """The stream of a run over the training samples of one or several tables, mixed by their weights.

    Args:
        sets: the tables.
        views: which samples.
        augment: what is seen of them.
        global_batch_size: samples of a step, over all workers.
        seed: of their order.
        num_steps: length of the run.
        user_share: share of each table's samples that the run draws from, (0, 1]: the first ones. Shards hold users by
            hash, so they are a random choice, and smaller shares are contained in larger ones.

    Raises:
        ValueError: a table has too few samples for its share of a global batch.
    """
    counts = tuple(
        _first_samples(
            np.fromiter(
                (_num_samples(group, views) for shard in s.shards for group in shard["row_groups"]), dtype=np.int64
            ),
            user_share,
        )
        for s in sets
    )
    shards = [shard for s in sets for shard in s.shards]
    sizes = np.array([len(shard["row_groups"]) for shard in shards], dtype=np.int64)
    return TrainingStream(
        directories=tuple(s.directory for s in sets),
        shards=np.repeat(np.array([shard["shard"] for shard in shards], dtype=np.int32), sizes),
        numbers=gather_ranges(np.zeros_like(sizes), sizes)[0].astype(np.int32),
        views=views,
        augment=augment,
        plan=Plan(counts, tuple(s.weight for s in sets), global_batch_size, seed, num_steps),
    )


def _first_samples(counts: np.ndarray, share: float) -> np.ndarray:
    """Samples of each row group, (R,), that are among the first of that share of all; the last one may be cut."""
    ends = np.cumsum(counts)
    return np.clip(round(share * int(counts.sum())) - (ends - counts), 0, counts)


def _num_samples(row_group: dict[str, Any], views: ViewConfig) -> int:
    return sum(row_group["samples"]["train"][kind] for kind in views.kinds)


def execution_options() -> ExecutionOptions:
    """Options that the trainer's DataConfig must carry too; the context's own do not reach the split dataset."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options
