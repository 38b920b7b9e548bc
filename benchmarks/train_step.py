"""Users per second of a training step: `python -m benchmarks.train_step --shards DIR [--views KIND] [--json FILE]`.

Forward, loss, backward, clipping and AdamW at D=256 with 4+4 layers on one batch of a tokenized table. Sections:
`rivals` (everything padded; length-sorted without de-duplication), `precision` (bfloat16 against float32), `cached`
(gradients cached in chunks against one graph), `memory` (peak of the cached step at growing batches, each in a process
of its own). The rivals
cannot hold the batch in one graph: they take it in micro-batches of users, with fewer negatives, each with its own
backward.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from benchmarks.harness import MIB, Case, Report, argument_parser, measure, peak_extra_bytes
from benchmarks.item_encoder import draw_batch
from benchmarks.rivals import PaddedClue, PlainClue, SortedClue, full_matrix_info_nce, take_users
from userrep.data.augment import AugmentConfig
from userrep.data.batch import UserBatch
from userrep.models.clue import Clue, ClueConfig
from userrep.training.encoding import MemoryConfig
from userrep.training.objective import ClueObjective
from userrep.training.optim import OptimConfig, build_optimizer
from userrep.training.state import TrainState, train_step

SECTIONS = ("rivals", "precision", "cached", "memory")
NUM_STEPS = 1_000  # of the schedule that the steps are taken from
# Expected gain over the padded and over the sorted encoder: yelp2019 by service, amazon2014 by time.
BARS = {"service": (25.0, 1.6), "time": (14.0, 1.3)}


def new_model(arguments: argparse.Namespace, vocab_size: int) -> Clue:
    """The encoder, the same at every call."""
    torch.manual_seed(0)
    layers = {"item_layers": arguments.layers, "service_layers": arguments.layers}
    return Clue(ClueConfig(dim=arguments.dim, num_heads=4, mlp_ratio=4, **layers), vocab_size)


def our_step(
    model: Clue, batch: UserBatch, budget_mib: int | None, precision: Literal["float32", "bfloat16"] = "float32"
) -> Callable[[], Any]:
    """A function that takes one step of this library on the batch; without a budget: one graph of everything."""
    memory = MemoryConfig(chunk_size=2**40) if budget_mib is None else MemoryConfig(budget_mib=budget_mib)
    objective = ClueObjective(model, memory=memory, precision=precision)
    config = OptimConfig()
    state = TrainState(model, build_optimizer(model, config))
    return lambda: train_step(objective, state, batch, config, NUM_STEPS)


def rival_step(model: PlainClue, batch: UserBatch, num_users: int, micro_batch_users: int) -> Callable[[], None]:
    """A function that takes one step of a rival on the first users of the batch, one graph per micro-batch of users."""
    config = OptimConfig()
    optimizer = build_optimizer(model, config)

    def step() -> None:
        for start in range(0, num_users, micro_batch_users):
            stop = min(start + micro_batch_users, num_users)
            anchor_BD, positive_BD = model(take_users(batch, start, stop)).chunk(2)
            loss = full_matrix_info_nce(anchor_BD, positive_BD, model.logit_scale)
            (loss * ((stop - start) / num_users)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare_rivals(report: Report, arguments: argparse.Namespace) -> None:
    """Ours, everything padded, length-sorted."""
    batch, vocab_size = draw_batch(arguments.shards, arguments.views, arguments.batch_size)
    size, num_padded = arguments.batch_size, min(arguments.padded_users, arguments.batch_size)
    padded = PaddedClue(new_model(arguments, vocab_size), AugmentConfig().max_events)
    rival = SortedClue(new_model(arguments, vocab_size), arguments.micro_batch_items)
    cases = [
        Case("ours", our_step(new_model(arguments, vocab_size), batch, arguments.budget_mib), size),
        Case("padded", rival_step(padded, batch, num_padded, num_padded), num_padded),
        Case("sorted", rival_step(rival, batch, size, arguments.micro_batch_users), size),
    ]
    results = measure(cases, arguments.rounds)
    facts = {**describe(batch, padded), "padded_users": num_padded, "micro_batch_users": arguments.micro_batch_users}
    report.results("training step", results, "user", views=arguments.views, **facts)
    ours, views = results["ours"], arguments.views
    report.speed(f"users/s over everything padded, {views}", ours, results["padded"], arguments.bar_padded)
    report.speed(f"users/s over length-sorted, {views}", ours, results["sorted"], arguments.bar_sorted)


def compare_precisions(report: Report, arguments: argparse.Namespace) -> None:
    """bfloat16 against float32, and the machine's matrix products in both."""
    batch, vocab_size = draw_batch(arguments.shards, arguments.views, arguments.batch_size)
    cases = [
        Case(name, our_step(new_model(arguments, vocab_size), batch, arguments.budget_mib, name), arguments.batch_size)
        for name in ("float32", "bfloat16")
    ]
    results = measure(cases, arguments.rounds)
    report.results("precision", results, "user", views=arguments.views, batch_size=arguments.batch_size)
    report.results("matrix product", measure([_product(name) for name in ("float32", "bfloat16")], arguments.rounds))
    claim = f"users/s of bfloat16 over float32, {arguments.views}"
    report.speed(claim, results["bfloat16"], results["float32"], arguments.bar_bfloat16)


def _product(dtype: str) -> Case:
    """A product that no cache and no memory limits: what the processor reaches in a precision."""
    one, other = torch.randn(2, 2048, 2048).to(getattr(torch, dtype))
    return Case(dtype, lambda: one @ other)


def describe(batch: UserBatch, padded: PaddedClue) -> dict[str, float]:
    """Sizes of a batch, its share of distinct items and of real tokens in the padded one."""
    lengths = np.diff(batch.token_offsets)
    num_histories, num_events = len(batch.history_offsets) - 1, len(batch.history_items)
    slots = num_histories * padded.num_slots * padded.max_tokens
    return {
        "histories": num_histories,
        "events": num_events,
        "items": len(lengths),
        "tokens": len(batch.tokens),
        "unique": round(len(lengths) / num_events, 3),
        "fill": round(float(lengths[batch.history_items].sum()) / slots, 4),
    }


def compare_cached(report: Report, arguments: argparse.Namespace) -> None:
    """Gradients cached in chunks against one graph, at the same batch."""
    batch, vocab_size = draw_batch(arguments.shards, arguments.views, arguments.batch_size)
    cases = [
        Case(name, our_step(new_model(arguments, vocab_size), batch, budget_mib), arguments.batch_size)
        for name, budget_mib in (("cached", arguments.budget_mib), ("one graph", None))
    ]
    results = measure(cases, arguments.rounds)
    report.results("cached step", results, "user", views=arguments.views, batch_size=arguments.batch_size)
    report.time("time of the cached step over one graph", results["cached"], results["one graph"], arguments.bar_cached)


def compare_memory(report: Report, arguments: argparse.Namespace) -> None:
    """Peak of the cached step at every batch size, beside what is resident before it."""
    peaks = {}
    for size in arguments.memory_sizes:
        peaks[size] = _run_fresh(arguments, size)
        report.console.print(f"cached step of {size:,} users: {peaks[size] / MIB:,.0f} MiB beside model and batch")
        report.line("memory", section="memory", batch_size=size, extra_bytes=peaks[size], views=arguments.views)
    if len(peaks) > 1:
        low, high = min(peaks.values()), max(peaks.values())
        claim = "largest deviation of a peak from the middle of all"
        report.verdict(claim, (high - low) / (high + low), arguments.bar_memory, "at most")


def _run_fresh(arguments: argparse.Namespace, size: int) -> int:
    options = ["--shards", arguments.shards, "--views", arguments.views, "--dim", arguments.dim]
    options += ["--layers", arguments.layers, "--threads", arguments.threads, "--peak-of", size]
    options += ["--budget-mib", arguments.budget_mib]
    program = [sys.executable, "-m", "benchmarks.train_step", *map(str, options)]
    done = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_peak(arguments: argparse.Namespace) -> None:
    """Prints the extra bytes of a cached step; the step before it has made what stays, as the optimizer's moments."""
    batch, vocab_size = draw_batch(arguments.shards, arguments.views, arguments.peak_of)
    step = our_step(new_model(arguments, vocab_size), batch, arguments.budget_mib)
    step()
    print(peak_extra_bytes(step))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--shards", type=Path, required=True, help="tokenized table of a job")
    parser.add_argument("--views", choices=BARS, default="service")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--batch-size", type=int, default=1_024, help="users")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4, help="of each transformer")
    parser.add_argument("--padded-users", type=int, default=8, help="users of the padded step; 0.4 GB each at D=256")
    parser.add_argument("--micro-batch-users", type=int, default=256, help="users of a graph of the sorted rival")
    parser.add_argument("--micro-batch-items", type=int, default=256, help="items of equal padding in it")
    parser.add_argument("--budget-mib", type=int, default=2_048, help="memory for the activations of our step")
    parser.add_argument("--memory-sizes", type=int, nargs="+", default=(256, 1_024, 8_192), metavar="B")
    parser.add_argument("--bar-padded", type=float, help="default: by --views")
    parser.add_argument("--bar-sorted", type=float, help="default: by --views")
    parser.add_argument("--bar-bfloat16", type=float, default=1.5)
    parser.add_argument("--bar-cached", type=float, default=1.4)
    parser.add_argument("--bar-memory", type=float, default=0.1)
    parser.add_argument("--peak-of", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bars = BARS[arguments.views]
    arguments.bar_padded, arguments.bar_sorted = arguments.bar_padded or bars[0], arguments.bar_sorted or bars[1]
    return arguments


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    if arguments.peak_of:
        print_peak(arguments)
        return
    report = Report("train_step", arguments.json, ("ray",))
    compare = {
        "rivals": compare_rivals,
        "precision": compare_precisions,
        "cached": compare_cached,
        "memory": compare_memory,
    }
    for section in arguments.sections:
        compare[section](report, arguments)


if __name__ == "__main__":
    main()
