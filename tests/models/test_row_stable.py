"""Under RowStable a row has the same bits in any batch and at any place of it, and values as without it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from userrep.models.row_stable import ROWS, RowStable

SHAPES = [(5, 3), (8, 24), (64, 192), (96, 33), (128, 384), (512, 70)]


@pytest.mark.parametrize(("width", "out"), SHAPES)
def test_rows_have_the_same_bits_in_any_company(width: int, out: int) -> None:
    torch.manual_seed(width)
    layer, rows = nn.Linear(width, out), torch.randn(2 * ROWS + 77, width)
    with torch.no_grad(), RowStable():
        whole = F.gelu(layer(rows))
        for count in (1, 2, 3, 7, 8, 31, ROWS - 1, ROWS, ROWS + 1):
            order = torch.randperm(len(rows))[:count]
            assert torch.equal(F.gelu(layer(rows[order])), whole[order]), count
    torch.testing.assert_close(whole, F.gelu(layer(rows)).detach())


def test_without_it_they_do_not() -> None:
    torch.manual_seed(0)
    layer, rows = nn.Linear(128, 384), torch.randn(512, 128)
    with torch.no_grad():
        whole = F.gelu(layer(rows))
        alone = torch.cat([F.gelu(layer(row[None])) for row in rows])
    if torch.equal(alone, whole):
        pytest.skip("the kernels of this machine are row-stable by themselves")


def test_shapes_and_layers_without_a_bias() -> None:
    torch.manual_seed(0)
    rows, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    with torch.no_grad(), RowStable():
        found = F.linear(rows, weight)
        assert F.gelu(rows.transpose(0, 1)).shape == (4, 3, 6)
        assert F.linear(rows[:0], weight).shape == (0, 4, 5)
    torch.testing.assert_close(found, F.linear(rows, weight))


def test_the_number_of_threads_is_as_before() -> None:
    before = torch.get_num_threads()
    with RowStable():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
