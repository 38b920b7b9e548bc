"""Time and memory of the contrastive loss: `python -m benchmarks.contrastive_loss [--json FILE] [--sizes B ...]`.

Forward and backward in float32 on given vectors, temperature included, against the full matrix in plain autograd and
against sentence-transformers (both directions; it has no gradient of the temperature). Claims: at most 300 MiB beside
the inputs at 32,768 users; at most 0.7 times the time of the full matrix where that fits; at most 0.6 times the time of
sentence-transformers at the better of two mini-batch sizes.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import MIB, Case, Report, Result, argument_parser, measure
from benchmarks.rivals import full_matrix_info_nce, sentence_transformers_loss
from userrep.losses.contrastive import info_nce, sigmoid_loss
from userrep.losses.negatives import Negatives

SIZES = (1_024, 4_096, 8_192, 16_384, 32_768)
MINI_BATCH_SIZES = (32, 512)  # its default, and the better one of a search
INVERSE_TEMPERATURE = 1 / 0.07
FULL_MATRICES = 6  # B x B matrices that plain autograd holds at its peak, rounded up
OURS, SIGMOID, FULL = "ours", "ours, sigmoid", "full matrix"


@dataclass
class Inputs:
    """What a step is given.

    Attributes:
        anchor: L2-normalised leaf (B, D).
        positive: L2-normalised leaf (B, D), somewhat like the anchors.
        logit_scale: scalar leaf, log of the inverse temperature.
        logit_bias: scalar leaf, of the pairwise loss.
        keys: int64 (B,), all different.
    """

    anchor: Tensor
    positive: Tensor
    logit_scale: Tensor
    logit_bias: Tensor
    keys: Tensor

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """What InfoNCE is a function of."""
        return self.anchor, self.positive, self.logit_scale


def make_inputs(size: int, dim: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Inputs of `size` users, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    anchor_BD = torch.randn(size, dim, generator=generator, dtype=torch.float64)
    positive_BD = anchor_BD + 2 * torch.randn(size, dim, generator=generator, dtype=torch.float64)
    return Inputs(
        anchor=F.normalize(anchor_BD, dim=1).to(dtype).requires_grad_(),
        positive=F.normalize(positive_BD, dim=1).to(dtype).requires_grad_(),
        logit_scale=torch.tensor(math.log(INVERSE_TEMPERATURE), dtype=dtype).requires_grad_(),
        logit_bias=torch.tensor(-10.0, dtype=dtype).requires_grad_(),
        keys=torch.arange(size),
    )


def our_info_nce(inputs: Inputs) -> Tensor:
    """The loss as a training step calls it."""
    return info_nce(*inputs.leaves(), Negatives.gather((inputs.keys,)))


def our_sigmoid(inputs: Inputs) -> Tensor:
    """The pairwise loss as a training step calls it."""
    return sigmoid_loss(*inputs.leaves(), inputs.logit_bias, Negatives.gather((inputs.keys,)))


def forward_backward(loss: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """One step without encoder and optimizer."""
    for leaf in inputs.leaves():
        leaf.grad = None
    loss(inputs).backward()


def make_cases(inputs: Inputs, max_full: int, max_rival: int) -> list[Case]:
    """Ours, and the alternatives that are bearable at this size."""
    size = len(inputs.keys)
    cases = [
        Case(OURS, lambda: forward_backward(our_info_nce, inputs)),
        Case(SIGMOID, lambda: forward_backward(our_sigmoid, inputs)),
    ]
    is_roomy = FULL_MATRICES * 4 * size**2 < psutil.virtual_memory().available
    if size <= max_full and is_roomy:
        cases.append(Case(FULL, lambda: forward_backward(lambda given: full_matrix_info_nce(*given.leaves()), inputs)))
    if size <= max_rival:
        for mini_batch_size in MINI_BATCH_SIZES:
            step = sentence_transformers_loss(mini_batch_size, INVERSE_TEMPERATURE)
            cases.append(Case(rival_name(mini_batch_size), lambda step=step: step(*inputs.leaves()[:2])))
    return cases


def rival_name(mini_batch_size: int) -> str:
    """Name of a case."""
    return f"sentence-transformers, mini-batch {mini_batch_size}"


def judge(report: Report, size: int, results: dict[str, Result]) -> None:
    """Verdicts on one size."""
    if size == 32_768:
        extra_mib = results[OURS].extra_bytes / MIB
        report.verdict("MiB beside the inputs at 32,768 users", extra_mib, 300, "at most")
    if FULL in results and size in (8_192, 16_384):
        report.time(f"time over the full matrix at {size:,} users", results[OURS], results[FULL], 0.7)
    rivals = [result for name, result in results.items() if name.startswith("sentence-transformers")]
    if rivals:
        better = min(rivals, key=lambda result: min(result.wall_s))
        report.time(f"time over {better.case.name} at {size:,} users", results[OURS], better, 0.6)


def exactness(report: Report, size: int, dim: int) -> None:
    """Largest difference of ours from the full matrix in float64, relative to the largest entry of the latter."""
    expected = _loss_and_gradients(lambda given: full_matrix_info_nce(*given.leaves()), size, dim, torch.float64)
    for dtype in (torch.float64, torch.float32):
        received = _loss_and_gradients(our_info_nce, size, dim, dtype)
        errors = {
            name: float((received[name].double() - value).abs().max() / value.abs().max())
            for name, value in expected.items()
        }
        shown = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        report.console.print(f"ours in {dtype} against the full matrix in float64 at {size:,} users: {shown}")
        report.line("exactness", size=size, dtype=str(dtype), **errors)


def _loss_and_gradients(loss: Callable[[Inputs], Tensor], size: int, dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = make_inputs(size, dim, dtype)
    value = loss(inputs)
    names = ("loss", "anchor", "positive", "logit_scale")
    return dict(zip(names, (value.detach(), *torch.autograd.grad(value, inputs.leaves())), strict=True))


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argument_parser(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="B", help="users in a batch")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--max-full", type=int, default=16_384, help="largest batch for the full matrix")
    parser.add_argument("--max-rival", type=int, default=8_192, help="largest batch for sentence-transformers")
    return parser.parse_args()


def main() -> None:
    """Runs the measurements and prints them."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    report = Report("contrastive_loss", arguments.json, ("sentence-transformers",))
    exactness(report, 1_000, arguments.dim)
    for size in arguments.sizes:
        inputs = make_inputs(size, arguments.dim)
        results = measure(make_cases(inputs, arguments.max_full, arguments.max_rival), arguments.rounds)
        report.results(f"contrastive loss, {size:,} users", results, size=size, dim=arguments.dim)
        judge(report, size, results)


if __name__ == "__main__":
    main()
