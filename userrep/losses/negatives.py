"""Which pairs of a global batch are contrasted: groups of rows, and pairs in them that are left out.

A row is one sample, an anchor and its positive. The matrix of this worker's anchors against the positives of all
workers is sorted by group, so what is contrasted are blocks of it, and own positives lie on a diagonal of each block.
The blocks are cut into tiles; no more than a tile of the matrix ever exists.

Legend: `B` rows on this worker, `G` rows on all workers, `R` and `C` rows and columns of a tile.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch

from userrep.losses.gather import all_gather, gather_sizes, rank


@dataclass(frozen=True)
class Strip:
    """Consecutive sorted rows (or columns) of one group.

    Attributes:
        span: their slice of the sorted rows (or columns).
        repeated: for each key, the ones that share it with another row of the batch: positions in the strip, and keys.
    """

    span: slice
    repeated: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def __len__(self) -> int:
        """Number of rows (or columns)."""
        return self.span.stop - self.span.start


@dataclass(frozen=True)
class Tile:
    """A part of the matrix. Own positives are its diagonal `diagonal`, counted as in `torch.Tensor.diagonal`."""

    rows: Strip
    columns: Strip
    diagonal: int

    def fill_excluded(self, values_RC: torch.Tensor, value: float) -> None:
        """Overwrites, in place, every pair that is no negative: own positives and pairs with an equal key."""
        if -len(self.rows) < self.diagonal < len(self.columns):
            values_RC.diagonal(self.diagonal).fill_(value)
        for (row, row_key), (column, column_key) in zip(self.rows.repeated, self.columns.repeated, strict=True):
            if len(row) and len(column):
                i, j = (row_key[:, None] == column_key).nonzero(as_tuple=True)
                values_RC[row[i], column[j]] = value


@dataclass(frozen=True)
class Block:
    """One group: slices of the sorted rows and columns, the column of its first row's positive, weight of each row."""

    rows: slice
    columns: slice
    first_positive: int
    weight: float


@dataclass(frozen=True)
class Negatives:
    """The pairs of this worker's anchors with the positives of all workers.

    Attributes:
        sizes: rows of every worker, B of this one among them.
        row_order: this worker's rows sorted by group, (B,).
        column_order: rows of all workers sorted by group, (G,).
        num_groups: groups of the global batch.
        blocks: those of them that have rows on this worker.
        keys: of the sorted columns, each (G,).
        mean_negatives: negatives of a row, mean over the global batch: G - 1 with one group and without equal keys.
    """

    sizes: tuple[int, ...]
    row_order: torch.Tensor
    column_order: torch.Tensor
    num_groups: int
    blocks: tuple[Block, ...]
    keys: tuple[torch.Tensor, ...]
    mean_negatives: float

    @classmethod
    def gather(cls, keys: tuple[torch.Tensor, ...], groups_B: torch.Tensor | None = None) -> "Negatives":
        """Exchanges keys and groups with all workers. A collective.

        Args:
            keys: at least one int64 (B,). Two rows that are equal in any of them are no negatives of each other: the
                same user, the same positive item.
            groups_B: int64 (B,), the group of each row. Rows of different groups are no negatives of each other, and
                the loss is the mean over groups, whatever their sizes. Default: all rows are one group.
        """
        if groups_B is None:
            groups_B = torch.zeros_like(keys[0])
        sizes = gather_sizes(len(groups_B), groups_B.device)
        table_GX = all_gather(torch.stack((groups_B, *keys), dim=1), sizes)
        column_order = table_GX[:, 0].argsort(stable=True)
        sorted_GX = table_GX[column_order]
        return cls(
            sizes=sizes,
            row_order=groups_B.argsort(stable=True),
            column_order=column_order,
            num_groups=len(table_GX[:, 0].unique()),
            blocks=_blocks(table_GX[:, 0], sizes),
            keys=sorted_GX[:, 1:].unbind(1),
            mean_negatives=_mean_negatives(sorted_GX),
        )

    def positives_B(self) -> torch.Tensor:
        """Sorted column that holds the positive of each sorted row, (B,)."""
        columns = [torch.arange(b.rows.stop - b.rows.start) + b.first_positive for b in self.blocks]
        return torch.cat(columns).to(self.row_order.device)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the sorted rows (B,) and sorted columns (G,) in this worker's loss, float64.

        Rows weigh W / (number of groups x rows of the group); columns of groups without rows on this worker weigh 0.
        """
        row_B = torch.zeros(len(self.row_order), dtype=torch.float64)
        column_G = torch.zeros(len(self.column_order), dtype=torch.float64)
        for block in self.blocks:
            row_B[block.rows] = column_G[block.columns] = block.weight
        return row_B.to(self.row_order.device), column_G.to(self.row_order.device)

    def tiles(self, tile_size: int) -> Iterator[Tile]:
        """All tiles of the blocks, of at most tile_size x tile_size, row by row."""
        positives_B = self.positives_B()
        column_keys = [(key_G, _is_repeated(key_G)) for key_G in self.keys]
        row_keys = [(key_G[positives_B], is_repeated_G[positives_B]) for key_G, is_repeated_G in column_keys]
        for block in self.blocks:
            columns = list(_strips(block.columns, tile_size, column_keys))
            for row in _strips(block.rows, tile_size, row_keys):
                first_positive = block.first_positive + row.span.start - block.rows.start
                for column in columns:
                    yield Tile(row, column, first_positive - column.span.start)


def _strips(span: slice, tile_size: int, keys: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[Strip]:
    for start in range(span.start, span.stop, tile_size):
        part = slice(start, min(start + tile_size, span.stop))
        repeated = []
        for key, is_repeated in keys:
            position = is_repeated[part].nonzero()[:, 0]
            repeated.append((position, key[part][position]))
        yield Strip(part, tuple(repeated))


def _is_repeated(key_G: torch.Tensor) -> torch.Tensor:
    _, inverse_G, counts = key_G.unique(return_inverse=True, return_counts=True)
    return (counts > 1)[inverse_G]


def _blocks(groups_G: torch.Tensor, sizes: tuple[int, ...]) -> tuple[Block, ...]:
    """Blocks of this rank's rows, from the groups of all rows and how many of these each rank has."""
    groups, group_of_row = groups_G.unique(return_inverse=True)
    # counts_WK: rows of each group on each worker.
    counts_WK = torch.stack([part.bincount(minlength=len(groups)) for part in group_of_row.split(sizes)]).cpu()
    group_sizes, own = counts_WK.sum(dim=0).tolist(), counts_WK[rank()].tolist()
    before = counts_WK[: rank()].sum(dim=0).tolist()
    blocks, row, column = [], 0, 0
    for size, count, earlier in zip(group_sizes, own, before, strict=True):
        weight = len(sizes) / (len(groups) * size)
        if count:
            blocks.append(Block(slice(row, row + count), slice(column, column + size), column + earlier, weight))
        row, column = row + count, column + size
    return tuple(blocks)


def _mean_negatives(sorted_GX: torch.Tensor) -> float:
    """Mean number of rows of the same group that differ in every key; columns: group, keys."""
    num_rows = len(sorted_GX)
    group_G, *keys = (column_G.unique(return_inverse=True)[1] for column_G in sorted_GX.unbind(1))
    # Inclusion and exclusion: + pairs with an equal group, - those equal in one key too, + those equal in two, ...
    pairs = 0
    for num_equal in range(len(keys) + 1):
        for chosen in combinations(keys, num_equal):
            code_G = group_G
            for key_G in chosen:  # a number for each pair of numbers below num_rows; several times faster than rows
                code_G = (code_G * num_rows + key_G).unique(return_inverse=True)[1]
            counts = code_G.bincount()
            pairs += (-1) ** num_equal * int((counts * (counts - 1)).sum())
    return pairs / num_rows
