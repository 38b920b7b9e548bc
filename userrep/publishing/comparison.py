"""How two versions of a table differ, in one streaming pass over both: coverage, rotation, norms, neighbours.

Needs numpy: `pip install 'userrep[tables]'`. Legend: `N` common ids, `S` of them in the sample, `D` dimensions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from userrep.publishing.alignment import AlignmentError, Map, ProcrustesSums
from userrep.publishing.pairs import Share, TablePair, matrix
from userrep.schema import VECTOR_COLUMN

MIN_SAMPLE = 100  # common ids; with fewer, ten neighbours are most of what there is


@dataclass(frozen=True)
class Norms:
    """Lengths in a table: of its vectors, and of the mean of all, which is 1 where they are all equal."""

    mean: float
    std: float
    of_mean: float


@dataclass(frozen=True)
class Comparison:
    """What changed from an old version to a new one.

    Attributes:
        old_rows: of the old table.
        new_rows: of the new table.
        common: ids that both have.
        old_norms: of all vectors of the old table.
        new_norms: of all vectors of the new table.
        neighbour_overlap: share of an id's nearest neighbours, among a sample of the common ids, that are the same in
            both tables; None where fewer ids are common than make a sample. No rotation changes it.
        sample: ids of that sample.
        maps: from the new vectors to the old ones, of each column that both have.
        unmapped: why there are none, where there are none.
    """

    old_rows: int
    new_rows: int
    common: int
    old_norms: Norms
    new_norms: Norms
    neighbour_overlap: float | None
    sample: int
    maps: list[Map] = field(default_factory=list)
    unmapped: str = ""

    def drift(self) -> Mapping[str, Any]:
        """Figures by name, JSON-plain."""
        figures: dict[str, Any] = {
            "rows before": self.old_rows,
            "rows": self.new_rows,
            "ids of before that are there still": self.common,
            "norm of a vector, before": self.old_norms.mean,
            "norm of a vector": self.new_norms.mean,
            "norm of the mean vector, before": self.old_norms.of_mean,
            "norm of the mean vector": self.new_norms.of_mean,
            "overlap of neighbours": self.neighbour_overlap,
        }
        for one in self.maps:
            figures[f"{one.column}: cosine with the vector before"] = one.unmapped_cosine
            figures[f"{one.column}: the same after the map"] = one.mean_cosine
        return figures | ({"no map": self.unmapped} if self.unmapped else {})


def compare(old: Path, new: Path, *, sample: int = 2000, neighbours: int = 10, seed: int = 0) -> Comparison:
    """Compares two committed tables; memory is bounded by a share of the ids and the sample.

    Args:
        old: directory of the version before.
        new: directory of the version after; any dtype and width each.
        sample: common ids among which neighbours are sought, drawn at random.
        neighbours: of each.
        seed: of the sample.

    Raises:
        IncompleteTableError: a directory holds no embedding table.
        IdSpaceMismatchError: the tables are of different ids.
    """
    pair, draw = TablePair(old, new), _Sample(sample, seed)
    dims, columns = pair.dims(), pair.vector_columns
    sums = {name: ProcrustesSums(name, dims[0]) for name in columns} if dims[0] == dims[1] else {}
    lengths, common = (_Lengths(dims[0]), _Lengths(dims[1])), 0
    for share in pair.shares(columns):
        common += len(share.places[0])
        for length, rows in zip(lengths, (share.old, share.new), strict=True):
            length.add(matrix(rows, VECTOR_COLUMN))
        draw.add(share)
        for name, one in sums.items():
            one.add(*share.vectors(name))
    maps, unmapped = _maps(sums, dims)
    return Comparison(
        old_rows=lengths[0].rows,
        new_rows=lengths[1].rows,
        common=common,
        old_norms=lengths[0].result(),
        new_norms=lengths[1].result(),
        neighbour_overlap=draw.overlap(neighbours),
        sample=draw.size,
        maps=maps,
        unmapped=unmapped,
    )


def neighbour_overlap(old_SD: np.ndarray, new_SD: np.ndarray, neighbours: int) -> float:
    """Mean share of the nearest neighbours of each row, by cosine, that are the same rows in both; exact."""
    nearest = []
    for vectors_SD in (old_SD, new_SD):
        scores_SS = vectors_SD @ vectors_SD.T
        np.fill_diagonal(scores_SS, -np.inf)
        nearest.append(np.argpartition(-scores_SS, neighbours - 1, axis=1)[:, :neighbours])
    shared = [len(set(one) & set(other)) for one, other in zip(*(found.tolist() for found in nearest), strict=True)]
    return float(np.mean(shared)) / neighbours


def _maps(sums: dict[str, ProcrustesSums], dims: tuple[int, int]) -> tuple[list[Map], str]:
    if dims[0] != dims[1]:
        return [], f"vectors have {dims[1]} dimensions, those of the version before {dims[0]}: no rotation joins them"
    try:
        return [one.solve() for one in sums.values()], ""
    except AlignmentError as error:
        return [], str(error)


class _Lengths:
    """Sums of lengths and of vectors."""

    def __init__(self, dim: int) -> None:
        self.rows, self._sum, self._squares = 0, 0.0, 0.0
        self._total_D = np.zeros(dim)

    def add(self, vectors_ND: np.ndarray) -> None:
        squares_N = np.einsum("nd,nd->n", vectors_ND, vectors_ND).astype(np.float64)
        self.rows += len(squares_N)
        self._sum += float(np.sqrt(squares_N).sum())
        self._squares += float(squares_N.sum())
        self._total_D += vectors_ND.sum(axis=0, dtype=np.float64)

    def result(self) -> Norms:
        rows = max(1, self.rows)
        mean = self._sum / rows
        variance = max(0.0, self._squares / rows - mean**2)
        return Norms(mean, float(np.sqrt(variance)), float(np.linalg.norm(self._total_D)) / rows)


class _Sample:
    """A random sample of the common ids in one pass: those with the smallest of all random numbers are kept."""

    def __init__(self, size: int, seed: int) -> None:
        self._limit, self._random = size, np.random.default_rng(seed)
        self._kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def size(self) -> int:
        return sum(len(numbers_S) for numbers_S, _, _ in self._kept)

    def add(self, share: Share) -> None:
        numbers_N = self._random.random(len(share.places[0]))
        chosen = np.argsort(numbers_N)[: self._limit]
        old_ND, new_ND = share.vectors(VECTOR_COLUMN)
        self._kept.append((numbers_N[chosen], old_ND[chosen], new_ND[chosen]))
        numbers_S, old_SD, new_SD = (np.concatenate(arrays) for arrays in zip(*self._kept, strict=True))
        best = np.argsort(numbers_S)[: self._limit]
        self._kept = [(numbers_S[best], old_SD[best], new_SD[best])]

    def overlap(self, neighbours: int) -> float | None:
        if self.size < max(MIN_SAMPLE, neighbours + 1):
            return None
        _, old_SD, new_SD = self._kept[0]
        return neighbour_overlap(old_SD, new_SD, neighbours)
