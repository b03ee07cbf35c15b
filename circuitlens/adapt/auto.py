"""Deciding by trying: which strategy, at which rate, with which replay, and how far.

The paper trains the circuit ("edit") and, for other languages, heads that matter least
("preserve"), and reports the better of the two on the test set. Here the choice is made on
validation, under the same rule as that of rate and α:

1. Candidates are ``circuit``, ``near-zero``, ``lora-norms`` and ``full``. Each is trained at every
   rate and with every amount of replay, four times the training of one strategy.
2. The best point of each on the target's validation split is compared, among the points that keep
   the source if ``keep_source`` asks for it.
3. The best candidate leads. Among those that it does not beat by one standard error of the paired
   difference, the one with fewest trained entries wins (the one-standard-error rule; Breiman et
   al. 1984). Examples of a group are not independent, so the error is over groups: with d_i the
   difference on example i, n examples and G groups it is

       sqrt(G / (G - 1) · sum over groups of (sum over the group of (d_i - mean d))²) / n,

   which is the usual one where every example is its own group.
4. Where validation has fewer than 50 examples, which cannot tell candidates apart, the training
   pool helps: each candidate is trained at the middle rate on two thirds of it and measured on the
   third one, for all three, and these examples count along with those of validation.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from circuitlens.adapt.choice import Choice
from circuitlens.adapt.restoring import restore
from circuitlens.adapt.search import Found, Search, search
from circuitlens.adapt.strategies import strategy_of
from circuitlens.adapt.tensor_files import Trained
from circuitlens.adapt.training import train
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.tasks.evaluation import label_scores

__all__ = ["CANDIDATES", "ENOUGH", "N_FOLDS", "Candidate", "Decision", "decide"]

logger = logging.getLogger(__name__)

CANDIDATES = ("circuit", "near-zero", "lora-norms", "full")
# Validation examples from which on they alone decide.
ENOUGH = 50
N_FOLDS = 3


@dataclass(frozen=True)
class Candidate:
    """A strategy with its accuracy on the examples that decide.

    Attributes:
        strategy: its name.
        size: entries that it trains; in results from before version 0.2, heads.
        accuracy: over the examples that decide.
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
        strategy: its name.
        circuit: the heads that the candidates were made from.
        candidates: all that were tried, the best first.
        why: one sentence.
        seconds: of training all candidates.
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
    model: HookedModel, choice: Choice, given: Search, label: str, scratch: Path
) -> tuple[Decision, Found]:
    """Train the candidates, and choose one (module docstring).

    Args:
        model: the proxy; left as it is.
        choice: circuit, scores and data.
        given: rates, amounts of replay, validation and the rule, as for any strategy.
        label: of progress bars and messages.
        scratch: an empty folder, which then holds the trained tensors of the chosen strategy.

    Returns:
        The decision, and what the chosen strategy found.

    Raises:
        InputError: if scores are missing, or there are too few examples to hold any out.
        NotFiniteError: if all trainings of a candidate diverge.
    """
    _ = choice.ranked
    small = len(given.validation) < ENOUGH
    folds = _folds(choice.target.groups, N_FOLDS, choice.seed) if small else []
    groups: list[Hashable] = [("validation", g) for g in given.validation.groups]
    if small:
        groups += [("training", g) for g in choice.target.groups]
    right = np.zeros((len(CANDIDATES), len(groups)), dtype=bool)
    kept: list[Found] = []
    seconds = 0.0
    # On disk, as four copies of a large model fit into no memory.
    places = [scratch / name for name in CANDIDATES]
    for row, (name, place) in enumerate(zip(CANDIDATES, places, strict=True)):
        folder = given.checkpoints and given.checkpoints / name
        mine = replace(given, checkpoints=folder)
        found = search(model, strategy_of(name), choice, mine, f"{label}: {name}")
        seconds += found.seconds
        answered = found.chosen.right[0]
        right[row, : len(answered)] = [mark == "1" for mark in answered]
        for k, fold in enumerate(folds):
            part = folder and folder / f"fold-{k}"
            hits, took = _held_out(model, name, choice, fold, folds, part)
            right[row, len(answered) + np.array(fold)] = hits
            seconds += took
        assert found.trainable is not None
        found.trainable.write(place)
        kept.append(replace(found, trainable=None))
    entries = [found.n_entries for found in kept]
    decision = _pick(CANDIDATES, entries, right, choice.circuit, groups)
    row = CANDIDATES.index(decision.strategy)
    for path in places[row].iterdir():
        path.rename(scratch / path.name)
    for place in places:
        shutil.rmtree(place)
    trainable = restore(model, scratch, Trained.found(scratch))
    return replace(decision, seconds=seconds), replace(kept[row], trainable=trainable)


def _folds(groups: Sequence[str], n_folds: int, seed: int) -> list[list[int]]:
    """Deal the groups at random to the folds, whose numbers of groups differ by at most one.

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


def _held_out(
    model: HookedModel,
    name: str,
    choice: Choice,
    fold: Sequence[int],
    folds: Sequence[Sequence[int]],
    checkpoints: Path | None,
) -> tuple[np.ndarray, float]:
    """Which examples of ``fold`` are answered correctly after training on the others; its time."""
    assert choice.training is not None
    strategy, data = strategy_of(name), choice.target
    trainable = strategy.make(model, choice, strategy.choose(model, choice))
    rest = [i for other in folds if other is not fold for i in other]
    log = train(
        trainable.model,
        data.take(rest),
        None,
        choice.training,
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
    names: Sequence[str],
    entries: Sequence[int],
    right: Bool[np.ndarray, "candidates examples"],
    circuit: Circuit,
    groups: Sequence[Hashable] | None = None,
) -> Decision:
    """Apply the rule to what was answered correctly; without ``groups`` every example is one."""
    groups = range(right.shape[1]) if groups is None else groups
    accuracy = right.mean(1)
    # Ties in accuracy go to fewer entries.
    best = max(range(len(names)), key=lambda i: (accuracy[i], -entries[i], -i))
    found = []
    for row, name in enumerate(names):
        gap = right[best].astype(float) - right[row]
        error = _standard_error(gap, groups)
        behind = (float(gap.mean()), error)
        found.append(Candidate(name, entries[row], float(accuracy[row]), behind))
    equal = [c for c in found if c.behind[0] <= c.behind[1]]
    chosen = min(equal, key=lambda c: (c.size, -c.accuracy))
    ranked = tuple(sorted(found, key=lambda c: -c.accuracy))
    top = ranked[0]
    why = (
        f"{chosen.strategy} has {chosen.accuracy:.1%} on {right.shape[1]} examples that were not "
        f"trained on; the best candidate ({top.strategy}) has {top.accuracy:.1%}, and of the "
        f"{len(equal)} within one standard error of it this trains the fewest entries."
    )
    logger.info("strategy='auto': %s", why)
    return Decision(chosen.strategy, circuit, ranked, why)
