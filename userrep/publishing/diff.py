"""Which ids two versions differ in, and by how much. Needs numpy: `pip install 'userrep[tables]'`."""

# pyright: reportAttributeAccessIssue=false
# (pyarrow.compute makes its functions at import, so no type checker sees them.)

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from userrep.publishing.pairs import Share, TablePair
from userrep.schema import VECTOR_COLUMN

QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9, 1.0)
CHANGES = ("added", "removed", "changed")


@dataclass(frozen=True)
class TableDiff:
    """Counts of ids, and cosines between the old and the new vector of the same id.

    Attributes:
        added: ids of the new table alone.
        removed: ids of the old table alone.
        changed: ids of both whose vectors differ in any bit.
        unchanged: ids of both whose vectors are equal.
        dims: width of the old and of the new vectors.
        dtypes: of the old and of the new table.
        mean_cosine: over ids of both; None where there are none, or widths differ.
        cosine_quantiles: at `QUANTILES`; likewise.
    """

    added: int
    removed: int
    changed: int
    unchanged: int
    dims: tuple[int, int]
    dtypes: tuple[str, str]
    mean_cosine: float | None
    cosine_quantiles: tuple[float, ...] | None


def diff_tables(old: Path, new: Path, on_ids: Callable[[str, pa.Array], None] | None = None) -> TableDiff:
    """Compares two committed tables by id, in bounded memory.

    Args:
        old: directory of the one.
        new: directory of the other.
        on_ids: called with one of `CHANGES` and ids, each id once.

    Raises:
        IncompleteTableError: a directory holds no embedding table.
        IdSpaceMismatchError: the tables are of different ids.
    """
    pair, counts, cosines = TablePair(old, new), dict.fromkeys((*CHANGES, "unchanged"), 0), []
    is_comparable = len(set(pair.dims())) == 1
    for share in pair.shares([VECTOR_COLUMN]):
        old_N, new_N = share.places
        is_changed_N = np.ones(len(new_N), bool)
        if is_comparable:
            old_ND, new_ND = share.vectors(VECTOR_COLUMN)
            is_changed_N = (old_ND != new_ND).any(axis=1)
            cosines.append(_cosines(old_ND, new_ND))
        counts["changed"] += int(is_changed_N.sum())
        counts["unchanged"] += len(new_N) - int(is_changed_N.sum())
        counts["removed"] += share.old.num_rows - len(old_N)
        counts["added"] += share.new.num_rows - len(new_N)
        if on_ids is not None:
            _tell(share, new_N[is_changed_N], on_ids)
    all_cosines = np.concatenate(cosines) if cosines else np.empty(0)
    has_any = len(all_cosines) > 0
    return TableDiff(
        **counts,
        dims=pair.dims(),
        dtypes=(pair.old.facts["dtype"], pair.new.facts["dtype"]),
        mean_cosine=float(all_cosines.mean(dtype=np.float64)) if has_any else None,
        cosine_quantiles=tuple(np.quantile(all_cosines, QUANTILES).tolist()) if has_any else None,
    )


def _cosines(old_ND: np.ndarray, new_ND: np.ndarray) -> np.ndarray:
    products_N = np.einsum("nd,nd->n", old_ND, new_ND)
    squares_N = np.einsum("nd,nd->n", old_ND, old_ND) * np.einsum("nd,nd->n", new_ND, new_ND)
    return (products_N / np.sqrt(squares_N)).astype(np.float32)


def _tell(share: Share, changed_N: np.ndarray, on_ids: Callable[[str, pa.Array], None]) -> None:
    old, new = (rows[share.id_column].combine_chunks() for rows in (share.old, share.new))
    on_ids("added", new.filter(pc.invert(pc.is_in(new, value_set=old))))
    on_ids("removed", old.filter(pc.invert(pc.is_in(old, value_set=new))))
    on_ids("changed", new.take(pa.array(changed_N)))
