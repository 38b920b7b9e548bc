"""Which pairs are contrasted, against loops over all pairs."""

import pytest
import torch

from tests.support.contrastive import excluded
from userrep.losses.negatives import Negatives

KEYS = (torch.tensor([1, 2, 3, 1, 5, 6, 2]), torch.tensor([9, 9, 8, 7, 6, 5, 4]))
GROUPS = torch.tensor([3, 0, 3, 3, 0, 8, 0])


@pytest.mark.parametrize("tile_size", [1, 2, 3, 100])
@pytest.mark.parametrize("keys", [KEYS[:1], KEYS])
def test_tiles_hold_every_negative_once(tile_size: int, keys: tuple[torch.Tensor, ...]) -> None:
    negatives = Negatives.gather(keys, GROUPS)
    seen = torch.zeros(7, 7, dtype=torch.int64)
    for tile in negatives.tiles(tile_size):
        values = torch.ones(len(tile.rows), len(tile.columns), dtype=torch.int64)
        tile.fill_excluded(values, 0)
        rows, columns = negatives.row_order[tile.rows.span], negatives.column_order[tile.columns.span]
        seen[rows[:, None], columns] += values
    expected = ~excluded(keys, GROUPS) & ~torch.eye(7, dtype=torch.bool)
    assert torch.equal(seen, expected.long())
    assert negatives.mean_negatives == pytest.approx(expected.sum().item() / 7)


def test_weights_make_the_mean_over_groups() -> None:
    negatives = Negatives.gather(KEYS, GROUPS)
    rows, columns = negatives.weights()
    for weights, order in ((rows, negatives.row_order), (columns, negatives.column_order)):
        expected = torch.tensor([1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 9, 1 / 3, 1 / 9], dtype=torch.float64)
        torch.testing.assert_close(weights, expected[order])


def test_positives_are_the_own_rows() -> None:
    negatives = Negatives.gather(KEYS, GROUPS)
    assert torch.equal(negatives.column_order[negatives.positives_B()], negatives.row_order)


def test_one_group_contrasts_everything() -> None:
    negatives = Negatives.gather((torch.arange(5),))
    assert negatives.num_groups == 1
    assert negatives.mean_negatives == 4
