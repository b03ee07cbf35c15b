"""What a transfer kept of the model before it: other tasks, weights, and the circuit itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from circuitlens.adapt.trainable import merged_copy
from circuitlens.baseline import label_balanced_mean
from circuitlens.cdt.rules import RuleSet
from circuitlens.circuit import Circuit
from circuitlens.errors import InputError
from circuitlens.models.geometry import WeightSlice
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.score_heads import relevance
from circuitlens.tasks import Task
from circuitlens.tasks.evaluation import Evaluation, evaluate

__all__ = [
    "CircuitShift",
    "Retained",
    "circuit_shift",
    "evaluate_all",
    "retained_tasks",
    "weight_drift",
]


@dataclass(frozen=True)
class Retained:
    """A task or language that was not trained on, before and after.

    Attributes:
        name: ``task/language``.
        before, after: on its test split.
        text_loss: next-token loss on its test texts, before and after, in nats
            per token (:func:`circuitlens.adapt.text_loss.text_loss`); ``None`` where the model
            predicts no next token, and in results from before version 0.2.
    """

    name: str
    before: Evaluation
    after: Evaluation
    text_loss: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {
            "name": self.name,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "text_loss": None if self.text_loss is None else list(self.text_loss),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Retained:
        """Rebuild what :meth:`to_dict` returned."""
        before, after = (Evaluation(**content[name]) for name in ("before", "after"))
        losses = content.get("text_loss")
        return cls(content["name"], before, after, (losses[0], losses[1]) if losses else None)


@dataclass(frozen=True)
class CircuitShift:
    """How the source circuit moved: discovery is run again on the adapted model.

    Attributes:
        after: the circuit of the adapted model, with as many heads.
        overlap: Jaccard index with the circuit before.
        rank_correlation: Spearman between the scores of all heads before and after.
    """

    after: Circuit
    overlap: float
    rank_correlation: float

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dictionary for JSON."""
        return {
            "after": self.after.to_dict(),
            "overlap": self.overlap,
            "rank_correlation": self.rank_correlation,
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> CircuitShift:
        """Rebuild what :meth:`to_dict` returned."""
        return cls(
            Circuit.from_dict(content["after"]), content["overlap"], content["rank_correlation"]
        )


def retained_tasks(task: Task, source: Task | None, retain: Sequence[Task | str]) -> list[Task]:
    """The tasks on which retention is measured: the source first, and what was asked for.

    Args:
        task: its other languages can be asked for by name.
        source: always measured, if there is one.
        retain: tasks, or names of languages.

    Raises:
        InputError: if two of them have the same name and language, or a language is unknown.
    """
    asked = [task.to(other) if isinstance(other, str) else other for other in retain]
    tasks = asked if source is None else [source, *asked]
    names = [other.full_name for other in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(
            f"Retention of {twice[0]} was asked for twice: name every task once, and leave out the "
            "source, which is always measured."
        )
    return tasks


def evaluate_all(
    model: HookedModel, tasks: Sequence[Task], *, quiet: bool = False
) -> list[Evaluation]:
    """Evaluate a model on the test splits of some tasks."""
    return [evaluate(model, task, task["test"], quiet=quiet) for task in tasks]


@torch.no_grad()
def weight_drift(before: HookedModel, after: HookedModel) -> Float[Tensor, "layer head"]:
    """Norm of the change of every head's weights (its slices of q, k, v, biases, and o).

    Under grouped-query attention the key/value slices count for every query head that shares them.

    Args:
        before, after: the same model with other weights; an adapter alongside them counts.

    Raises:
        InputError: if their heads differ.
    """
    g, other = before.geometry, after.geometry
    if (g.n_layers, g.n_heads) != (other.n_layers, other.n_heads):
        raise InputError(
            f"{before.name} and {after.name} have different heads, so their weights cannot be "
            "compared."
        )
    squares = torch.zeros(g.n_layers, g.n_heads, dtype=torch.float64)
    pieces: dict[str, list[tuple[Head, WeightSlice]]] = {}
    for head in g:
        for piece in g.slices(head):
            pieces.setdefault(piece.parameter, []).append((head, piece))
    for name, found in pieces.items():
        # One parameter at a time: a merged one is a copy.
        moved = _parameter(after, name).double() - _parameter(before, name).double()
        for head, piece in found:
            squares[head.layer, head.index] += piece.of(moved).square().sum().cpu()
    return squares.sqrt().float()


def _parameter(model: HookedModel, name: str) -> Tensor:
    """A parameter as it acts."""
    path, _, parameter = name.rpartition(".")
    module = model.hf.get_submodule(path)
    return cast(Tensor, getattr(merged_copy(module), parameter))


def circuit_shift(
    adapted: HookedModel,
    source: Task,
    circuit: Circuit,
    scores: HeadScores,
    *,
    quiet: bool = False,
) -> CircuitShift:
    """Run discovery of the source circuit again on an adapted model, as it was run before.

    Args:
        adapted: the model after a transfer.
        source: the source task.
        circuit: found before the transfer.
        scores: of all heads before the transfer; they give the method with its settings, the
            positions and the number of examples.
        quiet: no progress bar.

    Raises:
        InputError: if the adapted model answers no example of some label correctly.
    """
    how = scores.provenance.settings
    rules = how.get("rules")
    baseline = label_balanced_mean(
        adapted,
        source,
        positions=scores.positions,
        pooling=how.get("pooling", "pooled"),
        allow_chance=True,
        quiet=quiet,
    )
    again = relevance(
        adapted,
        source,
        baseline,
        method=scores.method if rules is None else RuleSet(**rules),
        mlps=how.get("mlps", scores.mlps is not None),
        path=how.get("path", "total"),
        steps=how.get("steps", 5),
        max_examples=len(scores.example_ids),
        seed=scores.provenance.seed,
        quiet=quiet,
    )
    after = again.top(len(circuit))
    ranks = spearmanr(scores.mean.flatten(), again.mean.flatten()).statistic
    return CircuitShift(after, circuit.overlap(after), float(ranks))
