"""Ray Data executes the plan: every task prepares one window, every row is one worker's batch of one step.

The recipe deals exactly: one row per block (`target_max_block_size = 1`) and preserved order let `streaming_split` deal
blocks round robin, so with rows ordered by (step, rank) rank r receives batch r of every step.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, ExecutionOptions

from userrep.data.augment import AugmentConfig, draw_events, drop_tokens
from userrep.data.batch import UserBatch, from_table, to_table
from userrep.data.plan import Plan, Window
from userrep.data.views import (
    Samples,
    ViewConfig,
    build_batch,
    list_samples,
    manifest_row_groups,
    merge_row_groups,
    read_row_group,
)

NO_PROGRESS_TIMEOUT_S = 6 * 3600  # Ray Data's default of 30 min also kills a consumer that is merely slow


def make_plan(
    shards: list[dict[str, Any]], views: ViewConfig, global_batch_size: int, seed: int, num_steps: int
) -> Plan:
    """Plan over the training samples of a shard table."""
    counts = tuple(sum(samples["train"][kind] for kind in views.kinds) for _, _, samples in manifest_row_groups(shards))
    return Plan(counts=counts, global_batch_size=global_batch_size, seed=seed, num_steps=num_steps)


def stream_dataset(
    directory: Path,
    shards: list[dict[str, Any]],
    views: ViewConfig,
    augment: AugmentConfig,
    plan: Plan,
    world_size: int,
    start_step: int,
) -> Dataset:
    """Batches of steps [start_step, plan.num_steps) for all workers, as one dataset over all remaining epochs.

    Args:
        directory: tokenized shards.
        shards: shard facts of their manifest.
        views: which samples.
        augment: what is seen of them.
        plan: the order.
        world_size: number of workers; divides the global batch.
        start_step: first step that is still to be taken.
    """
    # A dataset keeps the context that it was made in; other datasets of this process must not get these settings.
    context = DataContext.get_current().copy()
    context.target_max_block_size = 1
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_S
    windows = plan.windows(start_step)
    row_groups = [(shard, number) for shard, number, _ in manifest_row_groups(shards)]

    def prepare(rows: Any) -> Iterator[Any]:
        epoch, index = windows[int(rows["id"][0])]
        yield from window_batches(
            directory, row_groups, views, augment, plan, plan.window(epoch, index), world_size, start_step
        )

    with DataContext.current(context):
        return ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(prepare, batch_size=1)


def local_batches(
    directory: Path,
    shards: list[dict[str, Any]],
    views: ViewConfig,
    augment: AugmentConfig,
    plan: Plan,
    start_step: int = 0,
) -> Iterator[UserBatch]:
    """The same batches for a single worker, prepared in this process; needs no Ray."""
    row_groups = [(shard, number) for shard, number, _ in manifest_row_groups(shards)]
    for epoch, index in plan.windows(start_step):
        window = plan.window(epoch, index)
        for table in window_batches(directory, row_groups, views, augment, plan, window, 1, start_step):
            yield from_table(table)


def execution_options() -> ExecutionOptions:
    """Options that the trainer's DataConfig must carry too; the context's own do not reach the split dataset."""
    options = ExecutionOptions()
    options.preserve_order = True
    return options


def window_batches(
    directory: Path,
    row_groups: list[tuple[int, int]],
    views: ViewConfig,
    augment: AugmentConfig,
    plan: Plan,
    window: Window,
    world_size: int,
    start_step: int,
) -> Iterator[pa.Table]:
    """One-row tables of a window, ordered by (step, rank).

    What is random is drawn for the global batch, before it is cut for the workers: it does not depend on their number.
    """
    group_of_sample, number_of_sample = plan.samples(window)
    needed = np.unique(group_of_sample)
    group, first_users = merge_row_groups([read_row_group(directory, *row_groups[index]) for index in needed])
    samples = list_samples(group, views.kinds, "train")
    # Samples stand in user order, so those of one row group are consecutive.
    first_samples = np.searchsorted(samples.users, first_users)
    order = first_samples[np.searchsorted(needed, group_of_sample)] + number_of_sample
    rng = np.random.default_rng([plan.seed, window.epoch, window.index, 1])
    for local_step in range(window.num_steps):
        step = window.first_step + local_step
        global_samples: Samples = samples.take(order[local_step * plan.global_batch_size :][: plan.global_batch_size])
        events = draw_events(global_samples, augment, rng)
        if not start_step <= step < plan.num_steps:
            continue
        size = plan.global_batch_size // world_size
        token_filter = partial(drop_tokens, probability=augment.token_drop, seed=step) if augment.token_drop else None
        for rank in range(world_size):
            start, stop = rank * size, (rank + 1) * size
            mine = global_samples.take(np.arange(start, stop))
            yield to_table(build_batch(group, mine, events.of_users(start, stop), step, token_filter))
