"""A training step of TERACON: `python -m benchmarks.continual_step [--fill F ...] [--json FILE]`.

The first task (next item at every position) and the second one with retention of the first, against the same
mathematics written plainly: padded convolutions at every position, whole logits, Adam over whole tables. Both take the
same users, the same sampled ones for retention, and reach the same loss. Then a step over a large table of items, with
dense and with sparse gradients of it.
"""

import argparse
import copy
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import cast
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.harness import MIB, Case, Report, argument_parser, measure, peak_extra_bytes
from userrep.continual.baselines import FineAll
from userrep.continual.method import Progress
from userrep.continual.network import Network, TaskSpec
from userrep.continual.teracon import Teracon, TeraconConfig
from userrep.models.nextitnet import LAYER_NORM_EPS, Block, NextItNet, NextItNetConfig
from userrep.training.continual_step import open_optimizers

DILATIONS, ALPHA = (1, 4) * 4, 0.7
BATCHES = {1: 32, 2: 64}
RATE = 0.1  # of the users, for retention
SCALE = 25.0 + 0.01  # of the masks half way through an epoch
# Sequences per core-second of the official code, and how often as many this package is to reach: in its best exact mode
# and in float32 (Sein-Kim/TERACON@b48e074, torch 2, one core at 80 GFLOP/s).
OFFICIAL = {1: 12.3, 2: 37.5}
BARS = {1: 2.0, 2: 2.5}
BAR_FLOAT32 = 1.4
MEMORY_BATCH, MEMORY_BAR_MIB = 1024, 4096
LABELS = 1000
TABLE_ITEMS, TABLE_DIM, BAR_SPARSE = 200_000, 64, 2.0


class PlainLayer(nn.Module):
    """A convolution by `conv1d` over zero-padded sequences, layer norm, ReLU and mask."""

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(dim, dim, 3, dilation=dilation), nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.reach = 2 * dilation

    def forward(self, x_BLD: torch.Tensor, mask_D: torch.Tensor) -> torch.Tensor:
        """Same shape."""
        padded = F.pad(x_BLD.transpose(1, 2), (self.reach, 0))
        return F.relu(self.norm(self.conv(padded).transpose(1, 2))) * mask_D


class Plain(nn.Module):
    """Network and heads: every position of every sequence."""

    def __init__(self, method: Teracon) -> None:
        """Copies the weights of a method."""
        super().__init__()
        ours = cast(NextItNet, method.network.backbone)
        self.embedding, self.heads = copy.deepcopy(ours.item_embedding), copy.deepcopy(method.network.heads)
        self.layers = nn.ModuleList(PlainLayer(ours.dim, d * factor) for d in DILATIONS for factor in (1, 2))
        for point, layer in enumerate(self.layers):
            theirs, block = cast(PlainLayer, layer), cast(Block, ours.blocks[point // 2])
            matrix, norm = (block.conv1, block.norm1) if point % 2 == 0 else (block.conv2, block.norm2)
            theirs.conv.weight.data.copy_(matrix.weight.unflatten(1, (3, ours.dim)).transpose(1, 2))
            theirs.conv.bias = nn.Parameter(matrix.bias.detach().clone())
            theirs.norm.load_state_dict(norm.state_dict())

    def logits(self, items_BL: torch.Tensor, masks_KD: torch.Tensor, number: int, last_only: bool) -> torch.Tensor:
        """Of a task, at the last position (B, C) or at all of them (B, L, C)."""
        x_BLD = self.embedding(items_BL)
        for point in range(0, len(self.layers), 2):
            hidden = self.layers[point](x_BLD, masks_KD[point])
            x_BLD = x_BLD + self.layers[point + 1](hidden, masks_KD[point + 1])
        return self.heads[number](x_BLD[:, -1] if last_only else x_BLD)


def plain_step(
    method: Teracon, items_BL: torch.Tensor, labels_B: torch.Tensor, rows: torch.Tensor
) -> Callable[[], float]:
    """A step of the same method, written plainly; masks are those of the package, which cost next to nothing."""
    method = copy.deepcopy(method)
    plain, teacher = Plain(method), method.teacher
    plain_teacher = Plain(teacher) if teacher is not None else None
    masks = [*method.embeddings.parameters(), *(method.relations.parameters() if method.relations else ())]
    optimizer = torch.optim.Adam([*plain.parameters(), *masks])

    def step() -> float:
        optimizer.zero_grad()
        if teacher is None or plain_teacher is None:
            logits, targets = plain.logits(items_BL[:, :-1], method.masks(0, SCALE), 0, False), items_BL[:, 1:]
            loss = F.cross_entropy(logits[targets != 0], targets[targets != 0])
        else:
            past = items_BL[rows, :-1]
            with torch.no_grad():
                taught = plain_teacher.logits(past, teacher.masks(0, SCALE), 0, True)
            student = plain.logits(past, method.masks(0, SCALE), 0, True)
            own = F.cross_entropy(plain.logits(items_BL, method.masks(1, SCALE), 1, True), labels_B)
            loss = own + ALPHA * F.mse_loss(student, taught)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def our_step(
    method: Teracon, items_BL: torch.Tensor, labels_B: torch.Tensor, rows: torch.Tensor, precision: torch.dtype
) -> Callable[[], float]:
    """A step of the package; matrix products of the backbone, and of the teacher's, are of `precision`."""
    method = copy.deepcopy(method)
    for module in method.modules():
        if isinstance(module, Network):
            module.precision = precision
    optimizer = torch.optim.Adam(method.trainable())
    progress = Progress(1, 2)  # half way through an epoch

    def step() -> float:
        optimizer.zero_grad()
        with mock.patch.object(method, "_sample", return_value=[rows]):
            loss, _ = method.loss(items_BL, labels_B, progress)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def draw(
    arguments: argparse.Namespace, task: int, batch_size: int, fill: float
) -> tuple[Teracon, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A method at its task, and a batch; `fill` is the share of positions that are no pad, in every history."""
    torch.manual_seed(0)
    backbone = NextItNet(NextItNetConfig(dim=arguments.dim, dilations=DILATIONS), arguments.items)
    method = Teracon(Network(backbone), TeraconConfig())
    for spec in (TaskSpec("T1", "next_item", arguments.items), TaskSpec("T2", "item", LABELS))[:task]:
        method.begin_task(spec)
    items_BL = torch.randint(1, arguments.items, (batch_size, arguments.length))
    lengths_B = torch.randint(1, max(2, int(2 * fill * arguments.length)), (batch_size,)) if fill < 1 else None
    if lengths_B is not None:
        lengths_B = lengths_B.clamp(2, arguments.length)
        items_BL[torch.arange(arguments.length) < arguments.length - lengths_B[:, None]] = 0
    rows = torch.randperm(batch_size)[: max(1, int(RATE * batch_size))]
    return method, items_BL, torch.randint(0, LABELS, (batch_size,)), rows


def compare(report: Report, arguments: argparse.Namespace, task: int, fill: float) -> None:
    """One task at one share of positions that are no pad."""
    size = BATCHES[task]
    drawn = draw(arguments, task, size, fill)
    steps = {
        "plain": plain_step(*drawn),
        "ours": our_step(*drawn, torch.float32),
        "ours, bfloat16": our_step(*drawn, torch.bfloat16),
    }
    losses = {name: (step(), step()) for name, step in steps.items()}  # the second one tells of the gradient
    assert np.allclose(losses["ours"], losses["plain"], rtol=1e-3), losses
    results = measure([Case(name, step, size) for name, step in steps.items()], arguments.rounds)
    real = int((drawn[1] != 0).sum()) / drawn[1].numel()
    report.results(f"task {task}", results, "sequence", fill=round(real, 3), threads=arguments.threads)
    rates = {name: size / statistics.median(result.cpu_s) for name, result in results.items()}
    best = max(rates["ours"], rates["ours, bfloat16"])
    report.speed(f"task {task}, fill {real:.2f}, over plain, float32", results["ours"], results["plain"], BAR_FLOAT32)
    for name, rate, bar in (("best mode", best, BARS[task]), ("float32", rates["ours"], BAR_FLOAT32)):
        claim = f"task {task}, fill {real:.2f}, {name}: {rate:.1f} sequences per core-second over {OFFICIAL[task]}"
        report.verdict(claim, rate / OFFICIAL[task], bar, "at least")


def compare_tables(report: Report, arguments: argparse.Namespace) -> None:
    """A step of a task of few classes over a large table of items, with dense and with sparse gradients of it."""
    size = BATCHES[1]
    items_BL, labels_B = torch.randint(1, TABLE_ITEMS, (size, arguments.length)), torch.randint(0, LABELS, (size,))

    def table_step(is_sparse: bool) -> Callable[[], float]:
        torch.manual_seed(0)
        config = NextItNetConfig(dim=TABLE_DIM, dilations=DILATIONS[:4], sparse_items=is_sparse)
        method = FineAll(Network(NextItNet(config, TABLE_ITEMS)))
        method.begin_task(TaskSpec("T1", "item", LABELS))
        optimizers = open_optimizers(method, 1e-3)

        def step() -> float:
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss, _ = method.loss(items_BL, labels_B, Progress(0, 1))
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            return loss.item()

        return step

    results = measure([Case(n, table_step(n == "sparse"), size) for n in ("dense", "sparse")], arguments.rounds)
    report.results(f"{TABLE_ITEMS} items of width {TABLE_DIM}", results, "sequence", threads=arguments.threads)
    report.speed("sparse over dense gradients of items", results["sparse"], results["dense"], BAR_SPARSE)


def compare_memory(report: Report, arguments: argparse.Namespace) -> None:
    """Peak of a step of task 2 with many users, in a process of its own."""
    options = ["--dim", arguments.dim, "--length", arguments.length, "--items", arguments.items, "--peak"]
    program = [sys.executable, "-m", "benchmarks.continual_step", *map(str, options)]
    peak = int(subprocess.run(program, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])
    claim = f"MiB beside model and batch, task 2, {MEMORY_BATCH} users"
    report.verdict(claim, peak / MIB, MEMORY_BAR_MIB, "at most")


def main() -> None:
    """Runs the measurements and prints them."""
    parser = argument_parser(__doc__)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--length", type=int, default=100)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--fill", type=float, nargs="+", default=[1.0, 0.47], help="1.0 and that of the official file")
    parser.add_argument("--tasks", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        step = our_step(*draw(arguments, 2, MEMORY_BATCH, 1.0), torch.float32)
        print(peak_extra_bytes(step))
        return
    report = Report("continual_step", arguments.json)
    for task in arguments.tasks:
        for fill in arguments.fill:
            compare(report, arguments, task, fill)
    compare_tables(report, arguments)
    compare_memory(report, arguments)


if __name__ == "__main__":
    main()
