"""What a scaling law is fitted to: the factors, loss and compute of finished cells.

Legend: `M` cells, `K` factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Cells:
    """Finished cells. They are independent runs: checkpoints of one run share its luck, and count as one.

    Attributes:
        factors: of each factor its value in every cell, (M,), > 0: `{"N": ..., "D": ...}`.
        loss: of every cell, by one evaluation that is the same for all, (M,), > 0.
        compute: FLOPs of every cell, (M,), > 0. Without it, cells are ordered by the product of their factors, and no
            exponent is refused for too small a range of compute.

    Raises:
        ValueError: a value is not a positive number, or lengths differ.
    """

    factors: Mapping[str, np.ndarray]
    loss: np.ndarray
    compute: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuses what has no logarithm."""
        columns = {**self.factors, "loss": self.loss} | ({} if self.compute is None else {"compute": self.compute})
        for name, values in columns.items():
            if values.shape != (len(self.loss),):
                raise ValueError(
                    f"{name} has shape {values.shape} for {len(self.loss)} losses: one value for each cell"
                )
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                raise ValueError(
                    f"{name} of cell {bad[0]} is {values[bad[0]]}: a law is fitted to logarithms, so every value "
                    "must be above 0 and finite; leave out cells that diverged"
                )

    def __len__(self) -> int:
        """M."""
        return len(self.loss)

    def take(self, index: np.ndarray) -> "Cells":
        """Some of the cells, by position or by mask."""
        factors = {name: values[index] for name, values in self.factors.items()}
        return Cells(factors, self.loss[index], None if self.compute is None else self.compute[index])

    def place(self, cell: int) -> dict[str, float]:
        """Factors of one cell."""
        return {name: float(values[cell]) for name, values in self.factors.items()}

    def by_size(self) -> np.ndarray:
        """Positions (M,) of the cells, smallest first: by compute, or by the product of the factors."""
        size_M = np.prod(list(self.factors.values()), axis=0) if self.compute is None else self.compute
        return np.argsort(size_M, kind="stable")


def log_factors(names: Sequence[str], factors: Mapping[str, np.ndarray]) -> np.ndarray:
    """Natural logarithms (M, K) of the named factors.

    Raises:
        ValueError: a factor is missing.
    """
    missing = [name for name in names if name not in factors]
    if missing:
        raise ValueError(f"there are factors {sorted(factors)}, and the law needs {missing} too")
    return np.log(np.stack([np.asarray(factors[name], dtype=np.float64) for name in names], axis=1))
