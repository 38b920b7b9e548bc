"""Does one measure follow another: rank correlation over the places of a sweep, with a bootstrap interval."""

import numpy as np
from scipy.stats import rankdata

from userrep.scaling.fit import TAILS, Estimate

MIN_PLACES = 8  # fewer places in perfect order by chance: of 5, 2 of 120 orders
MAX_WIDTH = 1.0  # of the interval, whose range is 2: a wider one does not tell the sign from no relation


def rank_correlation(name: str, x_M: np.ndarray, y_M: np.ndarray, *, num_resamples: int, seed: int) -> Estimate:
    """Spearman's correlation with the percentiles of a bootstrap over places.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 13.3.

    Args:
        name: of the estimate.
        x_M: a measure at M places.
        y_M: the other.
        num_resamples: of places.
        seed: of the resamples.
    """
    num_places = len(x_M)
    if num_places < MIN_PLACES:
        return Estimate(name, 0.0, -1.0, 1.0, (f"{num_places} places have both, of at least {MIN_PLACES}",))
    if np.ptp(x_M) == 0 or np.ptp(y_M) == 0:
        return Estimate(name, 0.0, -1.0, 1.0, ("one of the two is the same everywhere",))
    drawn_RM = np.random.default_rng(seed).integers(num_places, size=(num_resamples, num_places))
    found_R = _spearman(x_M[drawn_RM], y_M[drawn_RM])
    low, high = np.quantile(found_R[np.isfinite(found_R)], TAILS).tolist()
    value = float(_spearman(x_M[None], y_M[None])[0])
    # Percentiles of a correlation near its bound may all lie on one side of it.
    low, high = min(low, value), max(high, value)
    refusals = (
        (f"the 95% interval {low:.2f} to {high:.2f} is wider than {MAX_WIDTH:g}",) if high - low > MAX_WIDTH else ()
    )
    return Estimate(name, value, low, high, refusals)


def _spearman(x_RM: np.ndarray, y_RM: np.ndarray) -> np.ndarray:
    """(R,); NaN where one side is constant."""
    ranks = [rankdata(values_RM, axis=1) for values_RM in (x_RM, y_RM)]
    x_RM, y_RM = (rank_RM - rank_RM.mean(axis=1, keepdims=True) for rank_RM in ranks)
    product_R = np.sqrt((x_RM**2).sum(axis=1) * (y_RM**2).sum(axis=1))
    return np.divide((x_RM * y_RM).sum(axis=1), product_R, out=np.full(len(x_RM), np.nan), where=product_R > 0)
