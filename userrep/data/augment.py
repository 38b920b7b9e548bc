"""What training sees of a sample: seeded, drawn for the global batch, so independent of the number of workers."""

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from userrep.config import Config
from userrep.data.batch import gather_ranges
from userrep.data.split import unit_interval
from userrep.data.views import DrawnEvents, Samples


class AugmentConfig(Config):
    """Training only; validation, test and inference always see the most recent `views.max_events` events."""

    cut: Literal["half", "random"] = "half"  # `time` views: the two halves as they are, or a random partition
    min_keep: float = Field(default=1.0, gt=0, le=1)  # share of its events that a view keeps: uniform in [min_keep, 1]
    max_events: int = Field(default=64, ge=1)  # of a view: a random choice of so many, before a next item the last ones
    # `next_item` views: any event but the first one is the target, or one of the later half (as in Recformer's code)
    targets: Literal["all", "later_half"] = "all"
    token_drop: float = Field(default=0.0, ge=0, lt=1)  # probability of leaving out a token of an item


def draw_events(samples: Samples, config: AugmentConfig, rng: np.random.Generator) -> DrawnEvents:
    """Draws which events each view keeps, in their order; every view keeps at least one."""
    if samples.is_next.any():
        samples = _draw_targets(samples, config, rng)
    num_samples = len(samples.users)
    starts = np.concatenate([samples.anchor_starts, samples.positive_starts])
    lengths = np.concatenate([samples.anchor_lengths, samples.positive_lengths])
    positions, offsets = gather_ranges(starts, lengths)
    # The smallest integers that will do: numpy sorts those of 16 bits in linear time.
    view = np.repeat(np.arange(2 * num_samples, dtype=np.min_scalar_type(2 * num_samples)), lengths)
    if config.cut == "random":
        view = _repartition(samples, view, rng)
        lengths = np.bincount(view, minlength=2 * num_samples)

    share = rng.uniform(config.min_keep, 1.0, size=2 * num_samples)
    num_kept = np.clip(np.ceil(share * lengths).astype(np.int64), 1, config.max_events)
    luck = rng.random(len(view))
    is_thinned = num_kept < lengths
    thinned = np.flatnonzero(is_thinned[view])  # only these need a rank, and sorting is what drawing costs
    by_luck = thinned[np.lexsort((luck[thinned], view[thinned]))]
    is_kept = np.ones(len(view), dtype=bool)
    is_kept[by_luck] = _rank_within(lengths[is_thinned]) < num_kept[view[by_luck]]
    view, positions = view[is_kept], positions[is_kept]
    in_order = np.argsort(view, kind="stable")  # the positions of a view ascend, also after a new partition
    counts = np.bincount(view, minlength=2 * num_samples)
    return DrawnEvents(positions[in_order], np.concatenate([[0], np.cumsum(counts)]))


def drop_tokens(
    positions: np.ndarray, offsets: np.ndarray, probability: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out tokens of an item dictionary; every item keeps at least one.

    Args:
        positions: of the tokens in a dictionary that all workers share; with the seed, they decide alone.
        offsets: borders of the items.
        probability: of leaving out a token.
        seed: of the step.

    Returns:
        The positions that stay, and the borders of the items in them.
    """
    luck = unit_interval(positions.astype(np.uint64), seed)
    is_kept = luck >= probability
    # The luckiest token of each item stays whatever its luck is.
    is_kept |= luck == np.repeat(np.maximum.reduceat(luck, offsets[:-1]), np.diff(offsets))
    counts = np.add.reduceat(is_kept.astype(np.int64), offsets[:-1])
    return positions[is_kept], np.concatenate([[0], np.cumsum(counts)])


def _repartition(samples: Samples, view: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """New view of each event: of a cut history, a random half (rounded up or down at random) becomes the anchor."""
    num_samples = len(samples.users)
    sizes = samples.anchor_lengths + samples.positive_lengths
    luck = rng.random(len(view))
    num_anchor = (sizes + rng.integers(0, 2, size=num_samples)) // 2
    sample = view % num_samples
    cut = np.flatnonzero(samples.is_cut[sample])
    by_luck = cut[np.lexsort((luck[cut], sample[cut]))]
    is_positive = _rank_within(sizes[samples.is_cut]) >= num_anchor[sample[by_luck]]
    view = view.copy()
    view[by_luck] = sample[by_luck] + num_samples * is_positive
    return view


def _draw_targets(samples: Samples, config: AugmentConfig, rng: np.random.Generator) -> Samples:
    """Draws the next item of every sample of that kind; its anchor becomes the most recent events before it.

    Source: targets of the later half as in AaronHeee/RecFormer@26b00a5:collator.py. Differs: the anchor is never empty.
    """
    lengths = samples.anchor_lengths  # of all events but the last one: what an anchor can have at most
    first = np.maximum(1, lengths // 2) if config.targets == "later_half" else np.ones_like(lengths)
    targets = first + (rng.random(len(lengths)) * (lengths + 1 - first)).astype(np.int64)
    kept = np.minimum(targets, config.max_events)
    return replace(
        samples,
        anchor_starts=np.where(samples.is_next, samples.anchor_starts + targets - kept, samples.anchor_starts),
        anchor_lengths=np.where(samples.is_next, kept, lengths),
        positive_starts=np.where(samples.is_next, samples.anchor_starts + targets, samples.positive_starts),
    )


def _rank_within(sizes: np.ndarray) -> np.ndarray:
    """0, 1, ..., size - 1 for each of several consecutive groups."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
