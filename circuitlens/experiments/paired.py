"""Paired bootstrap: is one strategy better than another on the same test examples?

1. An example's difference is how often strategy a was right on it minus how often b was, over the
   seeds that both have.
2. Examples are drawn with replacement, the same ones for both strategies and for all seeds.
3. Of several languages the mean over languages is what is drawn. In parallel corpora a sentence
   is in several of them under one id, and is drawn in all of these together: sentences that
   are hard for everyone are no more independent than they were chosen to be. Examples are drawn
   within blocks that are in the same languages, so that every language keeps its size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from circuitlens.errors import InputError
from circuitlens.utils.bootstrap import percentiles, resampled_means

__all__ = [
    "PairedDifference",
    "blocks_of",
    "bootstrap_difference",
    "differences",
    "holm",
    "interval_of",
    "shared_ids",
]

# Draws that are 0 but for rounding have to count as 0.
_DIGITS = 12


@dataclass(frozen=True)
class PairedDifference:
    """Target accuracy of strategy ``a`` minus that of ``b``.

    The interval and ``p`` are about similar other test examples, for models trained as these were;
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
        n_shared: ids that are in more than one of them, which are drawn together. Results from
            before version 0.2 hold no ids, and are drawn language by language.
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
    n_shared: int = 0


def differences(
    a: Bool[np.ndarray, "seed example"], b: Bool[np.ndarray, "seed example"]
) -> Float[np.ndarray, " example"]:
    """How much more often ``a`` is right than ``b`` on every example, as a share of the seeds."""
    # Whole numbers are subtracted, so that equal strategies differ by exactly 0.
    return np.asarray((a.sum(0) - b.sum(0)) / len(a))


def bootstrap_difference(
    languages: Sequence[Float[np.ndarray, "_"]],
    level: float,
    draws: int,
    ids: Sequence[Sequence[str] | None] | None = None,
) -> tuple[float, float, float, float]:
    """Mean over languages of the mean over examples, with its interval.

    Args:
        languages: of every language, a difference per example.
        level: of the interval.
        draws: how many.
        ids: of every language, the ids of the examples, where they are known. Equal ids are drawn
            together; where these mean nothing, as those that restart in every language, the
            interval is one of examples that go together by chance, and no less right.

    Returns:
        The difference, the lower and upper bound of the interval, and the two-sided p.

    Raises:
        InputError: if ``draws`` is not positive or ``level`` not between 0 and 1.
    """
    if draws < 1:
        raise InputError(f"draws must be positive, but is {draws}.")
    difference = float(np.mean([values.mean() for values in languages]))
    sums = np.zeros((len(languages), draws))
    for seed, block in enumerate(blocks_of(languages, ids)):
        # Rows are languages, columns the examples of the block in the same order.
        rows = np.stack([languages[n][places] for n, places in block.items()])
        drawn = resampled_means(rows, seed, draws).T * rows.shape[1]
        sums[list(block)] += drawn
    sizes = np.array([len(values) for values in languages])
    return difference, *interval_of((sums / sizes[:, None]).mean(0), level)


def interval_of(draws: Float[np.ndarray, " draw"], level: float) -> tuple[float, float, float]:
    """Percentile interval of the draws of a difference, and the two-sided p of no difference."""
    draws = draws.round(_DIGITS)
    low, high = percentiles(draws.reshape(-1, 1), level)[:, 0]
    other_side = min(float((draws <= 0).mean()), float((draws >= 0).mean()))
    return float(low), float(high), min(1.0, 2 * other_side)


def holm(p: Sequence[float]) -> list[float]:
    """Correct p values of a family for their number (Holm 1979, step-down Bonferroni)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    found, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        found[i] = largest
    return found


def shared_ids(ids: Sequence[Sequence[str] | None]) -> int:
    """Number of ids that are in more than one language."""
    counts = Counter(name for names in ids if names is not None for name in set(names))
    return sum(count > 1 for count in counts.values())


def blocks_of(
    languages: Sequence[Float[np.ndarray, "_"]], ids: Sequence[Sequence[str] | None] | None
) -> list[dict[int, list[int]]]:
    """Places of the examples that are in the same languages, by language, in one order."""
    found: dict[tuple[int, ...], dict[int, list[int]]] = {}
    known = [None] * len(languages) if ids is None else ids
    where = [{name: k for k, name in enumerate(names)} if names else None for names in known]
    for n, values in enumerate(languages):
        places = where[n]
        if places is None or len(places) != len(values):
            # Without ids, or with one that comes twice, nothing is known of the others.
            found[(n,)] = {n: list(range(len(values)))}
            continue
        for name in places:
            having = tuple(m for m, other in enumerate(where) if other and name in other)
            if having[0] == n:
                block = found.setdefault(having, {m: [] for m in having})
                for m in having:
                    other = where[m]
                    assert other is not None
                    block[m].append(other[name])
    return list(found.values())
