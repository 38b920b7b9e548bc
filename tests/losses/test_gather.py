"""Gathering rows of all ranks: order, sizes, and whose gradients are summed."""

import torch

from tests.support.distributed import run_ranks
from userrep.losses.gather import all_gather, all_gather_uneven, gather_sizes

ROWS = (3, 4, 3)


def _gather(rank: int, rows: tuple[int, ...]) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor, torch.Tensor]:
    mine = (torch.arange(2 * rows[rank], dtype=torch.float64).view(-1, 2) + 100 * rank).requires_grad_()
    sizes = gather_sizes(len(mine))
    gathered = all_gather(mine, sizes)
    weights = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered) + rank
    (gathered * weights).sum().backward()
    assert mine.grad is not None
    keys = all_gather_uneven(torch.arange(rows[rank]) + 10 * rank)
    return sizes, gathered.detach(), mine.grad, keys


def check(rows: tuple[int, ...]) -> None:
    results = run_ranks(_gather, len(rows), rows)
    expected = [
        [100 * rank + 2 * row, 100 * rank + 2 * row + 1] for rank in range(len(rows)) for row in range(rows[rank])
    ]
    place = 0
    for rank, (sizes, gathered, gradient, keys) in enumerate(results):
        assert sizes == rows
        assert gathered.tolist() == expected
        assert keys.tolist() == [10 * r + row for r in range(len(rows)) for row in range(rows[r])]
        for row in gradient.tolist():
            # Of its own entries, the sum over the ranks of what each of them multiplied these with.
            assert row == [sum(place + column + r for r in range(len(rows))) for column in (0, 1)], rank
            place += 2


def test_unequal_numbers_of_rows() -> None:
    check(ROWS)


def test_a_rank_without_rows() -> None:
    check((2, 0))


def test_one_process_needs_no_group() -> None:
    rows = torch.ones(3, 2)
    assert gather_sizes(3) == (3,)
    assert all_gather(rows, (3,)) is rows
