"""What a reader should know before trusting the numbers of a report."""

from __future__ import annotations

from collections.abc import Sequence

from circuitlens.adapt import TransferResult
from circuitlens.circuits.curve import FaithfulnessCurve
from circuitlens.experiments import Comparison
from circuitlens.scoring.head_scores import HeadScores

__all__ = ["UNSTABLE", "comparison_warnings", "run_warnings"]

# Below these a number says little; chosen by judgement, the report names each.
_FEW_EXAMPLES = 50
_LOW_ACCURACY = 0.6
UNSTABLE = 0.7
_SMALL_TEST = 200
_FEW_SEEDS = 3


def run_warnings(
    scores: HeadScores, curve: FaithfulnessCurve | None, results: Sequence[TransferResult]
) -> list[str]:
    """Limits of a discovery, its faithfulness and single transfers."""
    found: list[str] = []
    if (n := len(scores.example_ids)) < _FEW_EXAMPLES:
        found.append(f"Discovery used only {n} examples; rankings from so few are unstable.")
    if n >= 4 and not scores.whole:
        stability = scores.stability()
        if stability.reliability < UNSTABLE:
            found.append(
                f"The ranking of the heads is unstable: scores of two halves of the {n} examples "
                f"agree with a Spearman correlation of only {stability.spearman:.2f}."
            )
    if curve is not None and curve.accuracy[-1] < _LOW_ACCURACY:
        found.append(
            f"Competence is low: the whole model answers only {curve.accuracy[-1]:.0%} of the "
            "held-out examples."
        )
    if curve is not None and curve.caveat:
        found.append(curve.caveat)
    sizes = {r.target_after.n for r in results}
    if sizes and min(sizes) < _SMALL_TEST:
        found.append(f"The smallest test split has only {min(sizes)} examples.")
    return found


def comparison_warnings(comparison: Comparison) -> list[str]:
    """Limits of a comparison of strategies."""
    found: list[str] = []
    for error in comparison.errors:
        found.append(
            f"Failed and left out: {error['strategy']} for {error['language']}, seed "
            f"{error['seed']} ({error['type']}: {error['message']})."
        )
    seeds = comparison.summary()["n_seeds"]
    if len(seeds) and seeds.min() < _FEW_SEEDS:
        found.append(
            f"Some strategies have only {seeds.min()} seed{'s' if seeds.min() > 1 else ''}: the "
            "spread over seeds is unknown or rough there."
        )
    sizes = [cell["target_after"]["n"] for cell in comparison.cells]
    if sizes and min(sizes) < _SMALL_TEST:
        found.append(f"The smallest test split has only {min(sizes)} examples.")
    return found
