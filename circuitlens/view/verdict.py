"""What the numbers of a run amount to: a few questions, each answered with its evidence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np

from circuitlens.adapt import TransferResult
from circuitlens.circuit import Circuit
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.circuits.effects import HeadEffects
from circuitlens.experiments.simple_rivals import SimpleRival
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.view.caveats import UNSTABLE

__all__ = ["Verdict", "verdicts"]

# Thresholds by judgement; every answer gives the numbers that it is based on.
_FAITHFUL, _PARTLY = 0.8, 0.5

Answer = Literal["yes", "partly", "no"]


@dataclass(frozen=True)
class Verdict:
    """A question, its answer, and why."""

    question: str
    answer: Answer
    why: str


def verdicts(
    scores: HeadScores,
    circuit: Circuit,
    effects: HeadEffects | None,
    curve: FaithfulnessCurve | None,
    results: Sequence[TransferResult],
    rivals: Sequence[SimpleRival],
) -> list[Verdict]:
    """Answer what a reader asks first, as far as it was measured."""
    found: list[Verdict] = []
    if curve is not None and len(circuit) in curve.sizes and not curve.caveat:
        found += _circuit(curve, circuit)
    if not scores.whole and len(scores.example_ids) >= 4:
        found.append(_ranking(scores))
    if effects is not None:
        found.append(_needed(effects))
    for language in dict.fromkeys(r.target_language for r in results):
        found += _transfer(
            language,
            [r for r in results if r.target_language == language],
            [r for r in rivals if r.language == language],
        )
    return found


def _circuit(curve: FaithfulnessCurve, circuit: Circuit) -> Iterator[Verdict]:
    place = curve.sizes.index(len(circuit))
    f, accuracy = curve.faithfulness[place], curve.accuracy[place]
    low, high = curve.interval()[:, place]
    answer: Answer = "yes" if f >= _FAITHFUL else "partly" if f >= _PARTLY else "no"
    yield Verdict(
        "Does the circuit do the task on its own?",
        answer,
        f"{len(circuit)} of {curve.n_heads} heads keep f = {f:.2f} of the margin (95 % interval "
        f"{low:.2f} to {high:.2f}) and {accuracy:.1%} accuracy; the whole model has "
        f"{curve.accuracy[-1]:.1%}, the model without any head {curve.accuracy[0]:.1%}.",
    )
    draws = curve.layer_matched_faithfulness[:, place]
    if len(draws) and len(circuit) < curve.n_heads:
        below = int((draws < f).sum())
        share = below / len(draws)
        yield Verdict(
            "Is it these heads, and not any heads of these layers?",
            "yes" if share >= 0.95 else "partly" if share >= 0.75 else "no",
            f"The circuit is ahead of {below} of {len(draws)} random circuits with as many heads "
            f"in every layer (median f = {np.median(draws):.2f}).",
        )


def _ranking(scores: HeadScores) -> Verdict:
    stability = scores.stability()
    stable = stability.reliability >= UNSTABLE
    return Verdict(
        "Is the ranking of the heads stable?",
        "yes" if stable else "no",
        f"Scores of two halves of the {len(scores.example_ids)} examples agree with a Spearman "
        f"correlation of {stability.spearman:.2f} (reliability {stability.reliability:.2f}).",
    )


def _needed(effects: HeadEffects) -> Verdict:
    spare = effects.contradicted()
    names = ", ".join(map(str, spare))
    return Verdict(
        "Is each of its heads needed by the whole model?",
        "yes" if not spare else "partly" if len(spare) < len(effects.heads) / 2 else "no",
        f"Ablating {names} alone does not lower the margin, whatever the relevance says."
        if spare
        else f"Ablating any one of the {len(effects.heads)} heads lowers the margin.",
    )


def _transfer(
    language: str, results: Sequence[TransferResult], rivals: Sequence[SimpleRival]
) -> Iterator[Verdict]:
    best = max(results, key=lambda r: r.target_after.accuracy)
    reached = best.target_after.accuracy
    ngrams = next((r for r in rivals if r.name == "n-grams"), None)
    if ngrams is not None:
        difference = reached - ngrams.result.accuracy
        yield Verdict(
            f"{language}: does the model beat n-grams?",
            _ahead(reached, ngrams.result.accuracy, best.target_after.n),
            f"The best strategy ({best.strategy}) reaches {reached:.1%}, a logistic regression on "
            f"n-grams of the same rows {ngrams.result.accuracy:.1%} ({difference * 100:+.1f} "
            "points).",
        )
    by_name = {r.strategy: r for r in results}
    own = by_name.get("circuit")
    controls = [r for name, r in by_name.items() if name in _CONTROLS]
    if own is not None and controls:
        rival = max(controls, key=lambda r: r.target_after.accuracy)
        yield Verdict(
            f"{language}: does it matter that these heads are trained?",
            _ahead(own.target_after.accuracy, rival.target_after.accuracy, own.target_after.n),
            f"Training the circuit reaches {own.target_after.accuracy:.1%}, as many other heads "
            f"({rival.strategy}) {rival.target_after.accuracy:.1%}.",
        )
    if own is not None and own.source_change is not None:
        lost = -100 * own.source_change
        yield Verdict(
            f"{language}: is the source kept when the circuit is trained?",
            "yes" if lost <= 1 else "partly" if lost <= 5 else "no",
            f"The source changes by {-lost:+.1f} points of accuracy, the target by "
            f"{100 * own.target_gain:+.1f}.",
        )


_CONTROLS = ("near-zero", "random", "random-by-layer")


def _ahead(ours: float, theirs: float, n: int) -> Answer:
    """Whether one accuracy is above another by two standard errors of their difference."""
    error = sqrt((ours * (1 - ours) + theirs * (1 - theirs)) / n)
    return "yes" if ours - theirs > 2 * error else "no" if ours <= theirs else "partly"
