"""Encoding the items of a batch: `python -m benchmarks.item_encoder [--shards DIR] [--json FILE]`.

Forward and backward of the item transformer at D=256 with 4 layers over N item slots, whose gradients are given. Every
alternative works in micro-batches, each with its own backward, so that memory does not grow with N. Claims: FLOPs
within 5% of the ideal, which is every distinct item once, at its true length; no slower than length-sorted
micro-batches, of the better of two sizes, where all items are distinct.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Case, Report, argument_parser, measure
from benchmarks.rivals import PlainClue, pad, sorted_micro_batches
from userrep.data.augment import AugmentConfig
from userrep.data.batch import UserBatch, gather_ranges
from userrep.data.stream import open_stream, read_shard_sets
from userrep.data.views import ViewConfig, ViewKind
from userrep.manifest import read_manifest
from userrep.models.clue import Clue, ClueConfig
from userrep.models.packing import pack

SIZES = (256, 1_024, 8_192)
# Without shards: items as long as a line of text, as popular as by Zipf's law with exponent 1.
CATALOGUE, VOCAB, MEAN_TOKENS, LOG_STD, MAX_TOKENS = 20_000, 8_192, 13, 0.6, 64
MICRO_BATCH_SIZES = (64, 256)  # items of a graph of the sorted rivals: little padding, large products
PADDED_MICRO_BATCH_SIZE = 256
OURS, PADDED = "ours", "padded"


@dataclass(frozen=True)
class Items:
    """N slots that refer to U distinct items.

    Attributes:
        tokens: of the distinct items, one after another.
        offsets: their borders, (U + 1,).
        slots: item of each slot, (N,).
        max_tokens: what padding pads to.
        vocab_size: tokens that there are.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray
    max_tokens: int
    vocab_size: int

    def take(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and borders of the given items."""
        positions, offsets = gather_ranges(self.offsets[items], np.diff(self.offsets)[items])
        return self.tokens[positions], offsets

    def referred_by(self, slots: np.ndarray) -> "Items":
        """The items of other slots; those that none of them refers to are left out."""
        used, references = np.unique(slots, return_inverse=True)
        return Items(*self.take(used), references, self.max_tokens, self.vocab_size)


def synthetic_items() -> Items:
    """A catalogue whose slots are draws by popularity."""
    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEAN_TOKENS) - LOG_STD**2 / 2, LOG_STD, CATALOGUE).round().clip(1, MAX_TOKENS)
    offsets = np.append(0, lengths.cumsum()).astype(np.int64)
    popularity = 1 / np.arange(1, CATALOGUE + 1)
    slots = rng.choice(CATALOGUE, size=max(SIZES) * 4, p=popularity / popularity.sum())
    return Items(rng.integers(0, VOCAB, size=offsets[-1]), offsets, slots, MAX_TOKENS, VOCAB)


def draw_batch(shards: Path, kind: ViewKind, size: int) -> tuple[UserBatch, int]:
    """The first batch of a run on a tokenized table, and the table's number of tokens."""
    sets, views = read_shard_sets([(shards, 1.0)]), ViewConfig(kinds=(kind,))
    batch = next(open_stream(sets, views, AugmentConfig(), size, seed=0, num_steps=1).batches())
    return batch, read_manifest(shards).facts["vocab_size"]


def shard_items(shards: Path, kind: ViewKind, num_users: int) -> Items:
    """The events of a training batch as slots, in random order."""
    batch, vocab_size = draw_batch(shards, kind, num_users)
    slots = np.random.default_rng(0).permutation(batch.history_items)
    return Items(batch.tokens, batch.token_offsets, slots, ClueConfig().max_tokens, vocab_size)


def our_pass(model: Clue, items: Items, grad_ND: torch.Tensor, chunk_tokens: int) -> Callable[[], None]:
    """Every distinct item once, in chunks of whole items, without padding."""

    def run() -> None:
        slots_N = torch.from_numpy(items.slots.astype(np.int64))
        grad_UD = grad_ND.new_zeros(len(items.offsets) - 1, model.dim).index_add_(0, slots_N, grad_ND)
        packed = pack(items.offsets, chunk_tokens)
        tokens_T, order_U = torch.from_numpy(items.tokens[packed.positions]), torch.from_numpy(packed.order)
        for chunk in packed.chunks:
            item_UD = model.encode_items(tokens_T[chunk.positions], chunk.groups)
            item_UD.backward(grad_UD[order_U[chunk.sequences]])
        model.zero_grad(set_to_none=True)

    return run


def rival_pass(
    model: PlainClue, items: Items, grad_ND: torch.Tensor, micro_batch_size: int, is_sorted: bool
) -> Callable[[], None]:
    """Every slot, in micro-batches of so many, padded to their longest or, unsorted, to the longest there may be."""
    lengths = np.diff(items.offsets)[items.slots]

    def run() -> None:
        for order in sorted_micro_batches(lengths if is_sorted else np.zeros_like(lengths), micro_batch_size):
            tokens, offsets = items.take(items.slots[order])
            width = int(lengths[order].max()) if is_sorted else items.max_tokens
            item_ND = model.encode_items(*pad(tokens, offsets, width))
            item_ND.backward(grad_ND[torch.from_numpy(order)])
        model.zero_grad(set_to_none=True)

    return run


def ideal_flops(config: ClueConfig, lengths_U: np.ndarray) -> float:
    """Forward and backward of every distinct item once: matrices by token, attention by squared length."""
    per_token = 2 * config.dim**2 * (3 + 1 + 2 * config.mlp_ratio)
    return (
        3.0 * config.item_layers * float((per_token * lengths_U + 4 * config.dim * lengths_U.astype(float) ** 2).sum())
    )


def make_cases(items: Items, arguments: argparse.Namespace, is_repeated: bool) -> list[Case]:
    """The alternatives, on the same items and gradients.

    Args:
        items: what they encode.
        arguments: command line.
        is_repeated: slots share items, so a rival may encode the distinct ones; and padding is worth a look.
    """
    torch.manual_seed(0)
    config = make_config(arguments, items)
    clue = Clue(config, items.vocab_size)
    plain = PlainClue(clue)
    distinct = items.referred_by(np.arange(len(items.offsets) - 1))
    grad_ND, grad_UD = (torch.randn(len(given.slots), config.dim) for given in (items, distinct))
    runs = {OURS: our_pass(clue, items, grad_ND, arguments.chunk_tokens)}
    for size in MICRO_BATCH_SIZES:
        runs[sorted_name(size)] = rival_pass(plain, items, grad_ND, size, is_sorted=True)
        if is_repeated:
            runs[f"distinct, {sorted_name(size)}"] = rival_pass(plain, distinct, grad_UD, size, is_sorted=True)
    if is_repeated and len(items.slots) <= arguments.max_padded:
        runs[PADDED] = rival_pass(plain, items, grad_ND, PADDED_MICRO_BATCH_SIZE, is_sorted=False)
    return [Case(name, run, len(items.slots)) for name, run in runs.items()]


def sorted_name(micro_batch_size: int) -> str:
    """Name of a case."""
    return f"sorted, micro-batch {micro_batch_size}"


def make_config(arguments: argparse.Namespace, items: Items) -> ClueConfig:
    """Shape of the encoder; its service transformer is not used."""
    return ClueConfig(
        dim=arguments.dim,
        item_layers=arguments.layers,
        service_layers=0,
        num_heads=4,
        mlp_ratio=4,
        max_tokens=items.max_tokens,
    )


def compare(report: Report, source: Items, size: int, arguments: argparse.Namespace) -> None:
    """Slots as they were drawn, then as many distinct items."""
    items = source.referred_by(source.slots[:size])
    lengths_U = np.diff(items.offsets)
    results = measure(make_cases(items, arguments, is_repeated=True), arguments.rounds)
    ideal = ideal_flops(make_config(arguments, items), lengths_U)
    facts = {"slots": size, "unique": round(len(lengths_U) / size, 3), "mean_tokens": round(lengths_U.mean(), 2)}
    report.results(f"item encoder, {size:,} slots", results, "slot", ideal_gflop=ideal / 1e9, **facts)
    report.verdict(f"FLOPs over the ideal at {size:,} slots", results[OURS].flops / ideal, 1.05, "at most")

    available = np.random.default_rng(1).permutation(np.unique(source.slots))[:size]
    distinct = source.referred_by(available)
    results = measure(make_cases(distinct, arguments, is_repeated=False), arguments.rounds)
    title = f"{len(available):,} distinct items"
    report.results(f"item encoder, {title}", results, "slot", slots=len(available), unique=1.0)
    better = min((results[sorted_name(size)] for size in MICRO_BATCH_SIZES), key=lambda result: min(result.wall_s))
    report.time(f"time over {better.case.name}, {title}", results[OURS], better, 1.0)


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=Path, help="tokenized table of a job; default: synthetic items")
    parser.add_argument("--views", choices=("service", "time"), default="service", help="of its batch")
    parser.add_argument("--users", type=int, default=2_048, help="users of that batch, whose events are the slots")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="item slots")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--chunk-tokens", type=int, default=16_384, help="of a graph of ours")
    parser.add_argument("--max-padded", type=int, default=1_024, help="largest N at which everything is padded")
    return parser.parse_args()


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    report = Report("item_encoder", arguments.json, ("ray",))
    source = shard_items(arguments.shards, arguments.views, arguments.users) if arguments.shards else synthetic_items()
    for size in arguments.sizes:
        if size > len(source.slots):
            raise SystemExit(f"--sizes {size}: the batch has {len(source.slots)} events; more --users have more")
        compare(report, source, size, arguments)


if __name__ == "__main__":
    main()
