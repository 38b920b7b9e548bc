import numpy as np
import pytest

from userrep.scaling.cells import Cells, log_factors


def test_cells_are_ordered_by_compute_or_else_by_the_product_of_factors() -> None:
    factors = {"N": np.array([1.0, 2.0, 3.0]), "D": np.array([9.0, 1.0, 1.0])}
    assert Cells(factors, np.ones(3)).by_size().tolist() == [1, 2, 0]
    assert Cells(factors, np.ones(3), np.array([1.0, 3.0, 2.0])).by_size().tolist() == [0, 2, 1]


def test_taking_cells_takes_every_column() -> None:
    cells = Cells({"N": np.array([1.0, 2.0, 3.0])}, np.array([4.0, 5.0, 6.0]), np.array([7.0, 8.0, 9.0]))
    for index in (np.array([2, 0]), np.array([True, False, True])):
        taken = cells.take(index)
        assert sorted(taken.loss) == [4, 6]
        assert (taken.factors["N"] + 3 == taken.loss).all()
        assert taken.compute is not None
        assert (taken.compute == taken.loss + 3).all()
    assert cells.place(1) == {"N": 2.0}


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("column", ["N", "loss", "compute"])
def test_values_without_logarithm_are_refused(bad: float, column: str) -> None:
    values = {name: np.ones(3) for name in ("N", "loss", "compute")}
    values[column][1] = bad
    with pytest.raises(ValueError, match=f"{column} of cell 1 is {bad}"):
        Cells({"N": values["N"]}, values["loss"], values["compute"])


def test_columns_are_of_one_length() -> None:
    with pytest.raises(ValueError, match=r"N has shape \(2,\) for 3 losses"):
        Cells({"N": np.ones(2)}, np.ones(3))


def test_log_factors_have_the_order_that_is_asked_for() -> None:
    factors = {"D": np.array([1.0, np.e]), "S": np.ones(2), "N": np.array([np.e**2, 1.0])}
    assert log_factors(("N", "D"), factors) == pytest.approx(np.array([[2, 0], [0, 1]]))
    with pytest.raises(ValueError, match=r"\['D', 'N', 'S'\], and the law needs \['C'\]"):
        log_factors(("N", "C"), factors)
