"""Paired bootstrap: is one strategy better than another on the same test examples?

1. An example's difference is how often strategy a was right on it minus how often b was, over the
   seeds that both have.
2. Examples are drawn with replacement, the same ones for both strategies and for all seeds.
3. Of several languages, each has its own draws, and the mean over languages is what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from circuitlens.errors import InputError
from circuitlens.utils.bootstrap import percentiles, resampled_means

__all__ = ["PairedDifference", "bootstrap_difference", "differences"]

# Draws that are 0 but for rounding have to count as 0.
_DIGITS = 12


@dataclass(frozen=True)
class PairedDifference:
    """Target accuracy of strategy ``a`` minus that of ``b``.

    The interval and ``p`` speak of other test examples alike, for models trained as these were;
    the spread over seeds is in :meth:`circuitlens.Comparison.summary`.

    Attributes:
        a, b: the strategies.
        language: where; ``None`` for the mean over languages.
        difference: as a share of the examples, between -1 and 1.
        low, high: percentile bootstrap interval over examples.
        level: of that interval.
        p: share of the draws on the other side of 0 (or on it), doubled, at most 1; 0 means less
            than two in the number of draws. It is not corrected for looking at many pairs.
        n_examples: test examples, of all languages together.
        n_seeds: seeds that both strategies have; of several languages the smallest number.
        n_languages: languages that the mean is taken over.
    """

    a: str
    b: str
    language: str | None
    difference: float
    low: float
    high: float
    level: float
    p: float
    n_examples: int
    n_seeds: int
    n_languages: int


def differences(
    a: Bool[np.ndarray, "seed example"], b: Bool[np.ndarray, "seed example"]
) -> Float[np.ndarray, " example"]:
    """How much oftener ``a`` is right than ``b`` on every example, as a share of the seeds."""
    # Whole numbers are subtracted, so that equal strategies differ by exactly 0.
    return np.asarray((a.sum(0) - b.sum(0)) / len(a))


def bootstrap_difference(
    languages: Sequence[Float[np.ndarray, "_"]], level: float, draws: int
) -> tuple[float, float, float, float]:
    """Mean over languages of the mean over examples, with its interval.

    Args:
        languages: of every language, a difference per example.
        level: of the interval.
        draws: how many.

    Returns:
        The difference, the lower and upper bound of the interval, and the two-sided p.

    Raises:
        InputError: if ``draws`` is not positive or ``level`` not between 0 and 1.
    """
    if draws < 1:
        raise InputError(f"draws must be positive, but is {draws}.")
    difference = float(np.mean([values.mean() for values in languages]))
    # Parallel corpora have as many examples in every language: without seeds of their own all
    # languages would be drawn alike.
    drawn = [resampled_means(v[None], seed, draws)[:, 0] for seed, v in enumerate(languages)]
    means = np.asarray(drawn).mean(0).round(_DIGITS)
    low, high = percentiles(means.reshape(-1, 1), level)[:, 0]
    other_side = min(float((means <= 0).mean()), float((means >= 0).mean()))
    return difference, float(low), float(high), min(1.0, 2 * other_side)
