"""Deciding beforehand: edit the circuit or preserve it, and how many heads to train.

The paper trains the circuit ("edit") and, for other languages, heads that matter least
("preserve"), and reports the better of the two on the test set. Here the choice is made by
cross-validation inside the training data (pool B), so that the test split is never read, nor the
validation split, which chooses rate and epoch afterwards:

1. Candidates are ``circuit`` and ``near-zero`` with half, all and twice the circuit's heads.
2. Each is trained on all folds but one, for the same epochs at the same rate, and measured on that
   fold; the folds and their order are the same for all. Folds tear no group apart: hypotheses of
   one premise are trained on or held out together.
3. The best accuracy over all held-out examples leads. Among the candidates that it does not beat by
   one standard error of the paired difference, the one with fewest heads wins, and ``circuit``
   before ``near-zero``. Examples of a group are not independent, so the error is over groups: with
   d_i the difference on example i, n examples and G groups it is

       sqrt(G / (G - 1) · sum over groups of (sum over the group of (d_i - mean d))²) / n,

   which is the usual one where every example is a group of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from circuitlens.adapt.options import TrainingOptions
from circuitlens.adapt.strategies import Choice, strategy_of
from circuitlens.adapt.training import train
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks import Encoded
from circuitlens.tasks.evaluation import label_scores
from circuitlens.utils.progress import progress

__all__ = ["Candidate", "Decision", "decide"]

logger = logging.getLogger(__name__)

_FACTORS = (0.5, 1.0, 2.0)
_FOLDS = 3
# Of the two strategies, with each number of heads, on each part of the data.
N_TRAININGS = 2 * len(_FACTORS) * _FOLDS


@dataclass(frozen=True)
class Candidate:
    """A strategy and a number of heads, with its accuracy on held-out training data.

    Attributes:
        strategy: ``circuit`` or ``near-zero``.
        size: number of heads.
        accuracy: over all held-out examples.
        behind: how far the best candidate is ahead, and the standard error of that difference
            (paired, over groups of examples; see the module's docstring).
    """

    strategy: str
    size: int
    accuracy: float
    behind: tuple[float, float]


@dataclass(frozen=True)
class Decision:
    """What was chosen, and why.

    Attributes:
        strategy: ``circuit`` (edit) or ``near-zero`` (preserve).
        circuit: the top heads in the number chosen.
        candidates: all that were tried, the best first.
        why: one sentence.
        seconds: of training.
    """

    strategy: str
    circuit: Circuit
    candidates: tuple[Candidate, ...]
    why: str
    seconds: float = field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {
            "strategy": self.strategy,
            "circuit": self.circuit.to_dict(),
            "candidates": [
                [c.strategy, c.size, c.accuracy, list(c.behind)] for c in self.candidates
            ],
            "why": self.why,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Decision:
        """Rebuild what :meth:`to_dict` returned."""
        candidates = tuple(
            Candidate(strategy, size, accuracy, (behind[0], behind[1]))
            for strategy, size, accuracy, behind in content["candidates"]
        )
        circuit = Circuit.from_dict(content["circuit"])
        return cls(content["strategy"], circuit, candidates, content["why"], content["seconds"])


def decide(
    model: HookedModel,
    choice: Choice,
    data: Encoded,
    options: TrainingOptions,
    *,
    n_folds: int = _FOLDS,
    checkpoints: Path | None = None,
    quiet: bool = False,
) -> Decision:
    """Choose between editing and preserving, and the number of heads (module docstring).

    Args:
        model: the proxy; left as it is.
        choice: circuit and scores.
        data: pool B of the target language, with its groups.
        options: how to train; all epochs are used, at this rate.
        n_folds: parts of the data that are held out in turn.
        checkpoints: folder of the trainings' states, see :func:`circuitlens.transfer`.
        quiet: no progress bar.

    Raises:
        InputError: if scores are missing, or there are fewer groups of examples than folds.
    """
    scores = choice.ranked
    folds = _folds(data.groups, n_folds, options.seed)
    total = scores.n_layers * scores.n_heads
    size = len(choice.circuit)
    sizes = sorted({min(total, max(1, round(factor * size))) for factor in _FACTORS})
    plans = [(name, n) for name in ("circuit", "near-zero") for n in sizes]
    right = np.zeros((len(plans), len(data)), dtype=bool)
    seconds = 0.0
    for row, (name, n) in progress(
        list(enumerate(plans)), "Edit or preserve", quiet=quiet, total=len(plans)
    ):
        sized = replace(choice, circuit=_sized(choice, n))
        for k, fold in enumerate(folds):
            kept = checkpoints and checkpoints / f"{name}-{n}" / f"fold-{k}"
            right[row, fold], took = _held_out(model, name, sized, data, fold, folds, options, kept)
            seconds += took
    return replace(_pick(plans, right, choice, data.groups), seconds=seconds)


def _folds(groups: Sequence[str], n_folds: int, seed: int) -> list[list[int]]:
    """Deal the groups at random, as many to every fold as to any other up to one.

    Raises:
        InputError: if there are fewer groups than folds.
    """
    members: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    if len(members) < n_folds:
        have = f"{len(groups)} examples"
        if len(members) < len(groups):
            have = f"{len(members)} groups of examples ({have})"
        raise InputError(
            f"strategy='auto' holds out parts of the training data, but there are only {have} "
            f"for {n_folds} parts: choose 'circuit' or 'near-zero' yourself."
        )
    # In the order of their first examples, so that the permutation of groups of one is that of
    # the examples, whatever their names.
    blocks = list(members.values())
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed))
    return [[i for block in fold for i in blocks[block]] for fold in order.tensor_split(n_folds)]


def _sized(choice: Choice, n: int) -> Circuit:
    """The circuit itself, or the top heads in another number."""
    return choice.circuit if n == len(choice.circuit) else choice.ranked.top(n)


def _held_out(
    model: HookedModel,
    name: str,
    choice: Choice,
    data: Encoded,
    fold: Sequence[int],
    folds: Sequence[Sequence[int]],
    options: TrainingOptions,
    checkpoints: Path | None,
) -> tuple[np.ndarray, float]:
    """Which examples of ``fold`` are answered right after training on the others, and its time."""
    strategy = strategy_of(name)
    trainable = strategy.make(model, choice, strategy.choose(model, choice))
    rest = [i for other in folds if other is not fold for i in other]
    log = train(
        trainable.model,
        data.take(rest),
        None,
        options,
        trainable=trainable,
        checkpoints=checkpoints,
        quiet=True,
    )
    held = data.take(fold)
    predicted = label_scores(trainable.adapted(), held).argmax(1)
    return np.asarray(predicted == torch.tensor(held.gold)), log.seconds


def _standard_error(gap: Float[np.ndarray, " examples"], groups: Sequence[Hashable]) -> float:
    """Cluster-robust standard error of the mean of ``gap`` (formula in the module's docstring)."""
    place: dict[Hashable, int] = {}
    codes = [place.setdefault(group, len(place)) for group in groups]
    n, n_groups = gap.size, len(place)
    if n_groups < 2:
        return 0.0
    sums, sizes = np.bincount(codes, weights=gap), np.bincount(codes)
    # What a group contributes, written so that for groups of one it is the gap to the bit: the
    # decision hangs on a comparison with this error, and must not flip by rounding.
    parts = n_groups / n * (sums - gap.mean() * (sizes - n / n_groups))
    return float(parts.std(ddof=1) / np.sqrt(n_groups))


def _pick(
    plans: Sequence[tuple[str, int]],
    right: Bool[np.ndarray, "plans examples"],
    choice: Choice,
    groups: Sequence[Hashable] | None = None,
) -> Decision:
    """Apply the rule to what was answered right; without ``groups`` every example is one."""
    groups = range(right.shape[1]) if groups is None else groups
    accuracy = right.mean(1)
    # Ties in accuracy go to fewer heads, and to the circuit.
    best = max(range(len(plans)), key=lambda i: (accuracy[i], -plans[i][1], -i))
    found = []
    for row, (name, n) in enumerate(plans):
        gap = right[best].astype(float) - right[row]
        error = _standard_error(gap, groups)
        found.append(Candidate(name, n, float(accuracy[row]), (float(gap.mean()), error)))
    equal = [c for c in found if c.behind[0] <= c.behind[1]]
    chosen = min(equal, key=lambda c: (c.size, c.strategy != "circuit", -c.accuracy))
    ranked = tuple(sorted(found, key=lambda c: -c.accuracy))
    verb = "edit" if chosen.strategy == "circuit" else "preserve"
    top = ranked[0]
    why = (
        f"{verb}: {chosen.strategy} with {chosen.size} heads has {chosen.accuracy:.1%} on "
        f"{right.shape[1]} held-out training examples; the best candidate ({top.strategy}, "
        f"{top.size} heads) has {top.accuracy:.1%}, and of the {len(equal)} within one standard "
        "error of it this has the fewest heads."
    )
    logger.info("strategy='auto' decides to %s", why)
    return Decision(chosen.strategy, _sized(choice, chosen.size), ranked, why)
