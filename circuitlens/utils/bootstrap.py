"""Percentile bootstrap over examples: what a mean could have been on similar examples."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from circuitlens.errors import InputError

__all__ = ["check_level", "percentiles", "resampled_means"]


def resampled_means(
    values: Float[np.ndarray, "row example"], seed: int, draws: int = 1000
) -> Float[np.ndarray, "draw row"]:
    """Means over examples drawn with replacement, all rows on the same ones.

    Args:
        values: quantities (rows) that were measured on the same examples.
        seed: the draws follow from it and from the number of examples.
        draws: how many.
    """
    n = values.shape[1]
    rng = np.random.default_rng(seed)
    # Weights instead of index lists: one matrix product makes all draws.
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    return np.asarray(weights @ values.T)


def percentiles(
    draws: Float[np.ndarray, "draw row"], level: float
) -> Float[np.ndarray, "bound row"]:
    """Lower and upper bound of the middle share ``level`` of the draws.

    Raises:
        InputError: if ``level`` is not between 0 and 1.
    """
    check_level(level)
    tail = (1 - level) / 2
    return np.asarray(np.quantile(draws, [tail, 1 - tail], axis=0))


def check_level(level: float) -> None:
    """Reject an impossible confidence level.

    Raises:
        InputError: if ``level`` is not between 0 and 1.
    """
    if not 0 < level < 1:
        raise InputError(f"A confidence level must be between 0 and 1, but is {level}.")
