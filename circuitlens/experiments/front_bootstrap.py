"""Fronts compared sentence by sentence: is one strategy's front better, or were the sentences?

1. Validation sentences are drawn with replacement, those of the target and those of every task to
   keep. In parallel corpora a sentence is in several languages under one id, and is drawn in
   all of these together; the sentences of the source are drawn once for all languages.
2. Of every front the accuracies of all points are taken again on the sentences drawn, and the rule
   is applied again: the best target accuracy of those that keep the source, or the hypervolume.
3. What is compared is the mean over seeds and languages, of both strategies on the same draws.

A maximum over points is a little too high on the sentences that it was chosen on, for both
strategies; that cancels where they have as many points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
from jaxtyping import Float

from circuitlens.adapt.front import Front
from circuitlens.adapt.options import ROUNDING
from circuitlens.errors import InputError
from circuitlens.experiments.paired import blocks_of

__all__ = ["front_gains", "front_value", "front_values", "sentence_weights"]


def front_value(
    target: Float[np.ndarray, "draw point"],
    lost: Float[np.ndarray, "draw point"],
    keep_source: float | None,
    most_lost: float = 0.05,
) -> Float[np.ndarray, " draw"]:
    """Apply the rule in every draw; the first point is the start.

    Args:
        target: accuracy on the target.
        lost: largest loss on a task to keep.
        keep_source: what may be lost, as a share; ``None`` gives the hypervolume beyond the start.
        most_lost: of the hypervolume, see :meth:`circuitlens.adapt.Front.hypervolume`.
    """
    if keep_source is not None:
        allowed = lost <= keep_source + ROUNDING
        return np.asarray(np.where(allowed, target, -np.inf).max(1))
    order = lost.argsort(1, kind="stable")
    gain = np.take_along_axis(target - target[:, :1], order, 1)
    room = np.maximum(0.0, most_lost - np.take_along_axis(lost, order, 1))
    height = np.maximum.accumulate(np.maximum(gain, 0.0), 1)
    steps = np.diff(height, axis=1, prepend=0.0)
    return np.asarray((steps * room).sum(1))


def sentence_weights(
    ids: Sequence[Sequence[str]], draws: int, seed: int = 0
) -> list[Float[np.ndarray, "draw sentence"]]:
    """Weights of the sentences of every language in every draw; each row sums to 1.

    The first row has all sentences once, the others are bootstrap draws. Equal ids are drawn
    together.
    """
    generator = np.random.default_rng(seed)
    found = [np.zeros((draws + 1, len(names))) for names in ids]
    sizes = [np.zeros(len(names)) for names in ids]
    for block in blocks_of(sizes, ids):
        n = len(next(iter(block.values())))
        drawn = generator.integers(0, n, (draws, n))
        counts = np.stack([np.bincount(row, minlength=n) for row in drawn])
        counts = np.concatenate([np.ones((1, n)), counts])
        for language, places in block.items():
            found[language][:, places] = counts
    return [weights / weights.shape[1] for weights in found]


def front_values(
    fronts: Mapping[str, Sequence[Front]],
    draws: int,
    keep_source: float | None,
) -> Float[np.ndarray, " draw"]:
    """Mean over languages and seeds of what the rule gives, without drawing first, then per draw.

    Args:
        fronts: of one strategy, by language, one a seed.
        draws: bootstrap draws.
        keep_source: see :func:`front_value`.

    Raises:
        InputError: if a front does not say which examples its points answer.
    """
    languages = list(fronts)
    for language in languages:
        for front in fronts[language]:
            if not front.ids or not all(point.right for point in front.points):
                raise InputError(
                    f"The fronts of {language} do not say which examples are answered correctly: "
                    "they are from before version 0.2, so compare again."
                )
    own = sentence_weights([fronts[name][0].ids[0] for name in languages], draws)
    means = np.zeros((len(languages), draws + 1))
    # The same draws for every language and seed: it is the same task.
    of_task = cache(lambda ids, k: sentence_weights([ids], draws, seed=k)[0])
    for n, language in enumerate(languages):
        for front in fronts[language]:
            drawn = _drawn(front, own[n], of_task)
            means[n] += front_value(*drawn, keep_source) / len(fronts[language])
    return np.asarray(means.mean(0))


def front_gains(
    fronts: Sequence[Front], losses: Sequence[float], draws: int
) -> Float[np.ndarray, "draw loss"]:
    """Mean over seeds of what is gained on the target at most so much lost.

    Args:
        fronts: of one strategy in one language, one a seed.
        losses: that are allowed, as shares.
        draws: bootstrap draws; the first row is without drawing. Without any, fronts need not say
            which examples are right.
    """
    if not draws:
        found = [[front.choose(x).target - front.start.target for x in losses] for front in fronts]
        return np.asarray(np.mean(found, axis=0, keepdims=True))
    own = sentence_weights([fronts[0].ids[0]], draws)[0]
    of_task = cache(lambda ids, k: sentence_weights([ids], draws, seed=k)[0])
    gains = np.zeros((draws + 1, len(losses)))
    for front in fronts:
        target, lost = _drawn(front, own, of_task)
        for i, x in enumerate(losses):
            gains[:, i] += (front_value(target, lost, x) - target[:, 0]) / len(fronts)
    return gains


def _drawn(
    front: Front,
    own: Float[np.ndarray, "draw sentence"],
    of_task: Callable[[tuple[str, ...], int], Float[np.ndarray, "draw sentence"]],
) -> tuple[Float[np.ndarray, "draw point"], Float[np.ndarray, "draw point"]]:
    """Accuracy on the target and largest loss elsewhere of every point in every draw."""
    target = own @ _right(front, 0).T
    losses = []
    for k in range(1, len(front.ids)):
        kept = of_task(front.ids[k], k) @ _right(front, k).T
        losses.append(kept[:, :1] - kept)
    return target, np.max(losses, axis=0) if losses else np.zeros_like(target)


def _right(front: Front, k: int) -> Float[np.ndarray, "point sentence"]:
    rows = [[mark == "1" for mark in point.right[k]] for point in front.points]
    return np.array(rows, dtype=float)
