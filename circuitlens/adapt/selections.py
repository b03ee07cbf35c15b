"""Which heads have to change: selections that look at the target's training data.

Relevance says which heads carry the task in the source language. These say which ones the target
pulls at, or fails in, from pool B of the target alone:

* Fisher information: mean over examples of the squared gradient of the loss, summed over a head's
  slices of q, k, v and o (the empirical Fisher; Kirkpatrick et al. 2017, arXiv 1612.00796).
* |weight × gradient|: what the loss would change by, to first order, if an entry were zero, summed
  in absolute value over a head's slices (Molchanov et al. 2019, arXiv 1906.10771).
* Lost relevance: relevance on source examples minus relevance on the target's.

Layer-wise versions rank layers by the sum over their heads and fill the circuit layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.adapt.choice import Choice
from circuitlens.baseline import examples_by_id, label_balanced_mean
from circuitlens.cdt.rules import RuleSet
from circuitlens.circuit import Circuit
from circuitlens.errors import MODEL, TASK, InputError, check_types, check_whole
from circuitlens.models.freezing import gradients
from circuitlens.models.hooked import HookedModel
from circuitlens.nodes import Head
from circuitlens.scoring.head_scores import HeadScores
from circuitlens.scoring.request import Request
from circuitlens.scoring.score_heads import score_encoded
from circuitlens.scoring.scorers import scorer
from circuitlens.tasks import Encoded, Example, Task

__all__ = [
    "MAX_EXAMPLES",
    "Criterion",
    "by_layer",
    "changed_layers",
    "head_pull",
    "lost_relevance",
    "pulled_heads",
    "relevant_layers",
    "select_heads",
]

Criterion = Literal["fisher", "weight-gradient", "lost-relevance"]
# A gradient of each example by itself; more hardly move the ranking.
MAX_EXAMPLES = 256


def select_heads(
    model: HookedModel,
    task: Task,
    size: int,
    by: Criterion = "fisher",
    *,
    layers: bool = False,
    scores: HeadScores | None = None,
    source: Task | None = None,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> Circuit:
    """Choose the heads that a target language pulls at, or fails in, from its training data.

    Args:
        model: competent in the source language; left as it is.
        task: in the target language; pool B is read.
        size: number of heads.
        by: ``"fisher"`` (squared gradient), ``"weight-gradient"`` (weight times gradient) or
            ``"lost-relevance"`` (relevance on the source minus relevance on the target).
        layers: rank whole layers, and fill the circuit from the first one on.
        scores: of the source; needed for lost relevance.
        source: the source task, for lost relevance; by default the one that ``task`` was made from.
        max_examples: use a random subset of pool B of this size.
        seed: for the subset.

    Returns:
        A circuit for :func:`circuitlens.transfer` and any other verb.

    Raises:
        InputError: for an unknown criterion, a size that the model does not have, or lost
            relevance without scores and a source task.
    """
    check_types("select_heads", model=(model, HookedModel, MODEL), task=(task, Task, TASK))
    size = check_whole("size", size, 1)
    g = model.geometry
    if size > len(g):
        raise InputError(f"size is {size}, but the model has {len(g)} heads.")
    if by not in get_args(Criterion):
        known = ", ".join(get_args(Criterion))
        raise InputError(f"There is no criterion {by!r}; use one of {known}.")
    data = task.encode(model, task["pool_b"])
    if by == "lost-relevance":
        source = source or task.origin
        if scores is None or source is None:
            raise InputError("Lost relevance compares with the source: pass scores=… and source=….")
        values = lost_relevance(model, data, source, scores, max_examples=max_examples, seed=seed)
    else:
        values = head_pull(model, data, by, max_examples=max_examples, seed=seed)
    return _chosen(values, size, f"{by}, {task.full_name}", layers=layers)


def head_pull(
    model: HookedModel,
    data: Encoded,
    by: str,
    *,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> Float[Tensor, "layer head"]:
    """How much a loss pulls at every head, by ``"fisher"`` or ``"weight-gradient"``.

    Under grouped-query attention a key/value head counts for every query head that shares it.

    Args:
        model: is left as it is.
        data: encoded examples; one forward and backward pass each.
        by: the criterion.
        max_examples, seed: a random subset is used where there are more.
    """
    g = model.geometry
    pieces = {head: g.slices(head) for head in g}
    named = dict(model.hf.named_parameters())
    names = list(dict.fromkeys(p.parameter for found in pieces.values() for p in found))
    sums = {n: torch.zeros_like(named[n], dtype=torch.float32) for n in names}
    chosen = _sample(data, max_examples, seed)
    with gradients(model.hf, wanted=True), torch.enable_grad():
        for _, batch in chosen.batches(1 if by == "fisher" else 8, model.device):
            losses = batch.readout.losses(model, batch, model.hf)
            found = torch.autograd.grad(
                losses.sum(), [named[n] for n in names], allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(names, found, strict=True):
                sums[name] += gradient.float().square() if by == "fisher" else gradient.float()
    if by != "fisher":
        sums = {n: (total * named[n].detach().float()).abs() for n, total in sums.items()}
    values = torch.zeros(g.n_layers, g.n_heads)
    for head, found_pieces in pieces.items():
        values[head.layer, head.index] = sum(
            float(p.of(sums[p.parameter]).sum()) for p in found_pieces
        ) / len(chosen)
    return values


def lost_relevance(
    model: HookedModel,
    data: Encoded,
    source: Task,
    scores: HeadScores,
    *,
    max_examples: int = MAX_EXAMPLES,
    seed: int = 0,
) -> Float[Tensor, "layer head"]:
    """Relevance on source examples minus relevance on the target's, in logits.

    The target's examples are scored whether they are answered correctly or not, in the same way as
    the source's, against the means of the source.

    Args:
        model: is left as it is.
        data: encoded examples of the target.
        source: the source task.
        scores: of all heads on the source.
        max_examples, seed: a random subset of ``data`` is used where there are more.
    """
    how = scores.provenance.settings
    baseline = label_balanced_mean(
        model,
        source,
        positions=scores.positions,
        pooling=how.get("pooling", "pooled"),
        examples=_scored(source, scores),
        allow_chance=True,
        quiet=True,
    )
    rules = how.get("rules")
    by = scorer(scores.method if rules is None else RuleSet(**rules))
    request = Request(
        positions=scores.positions, path=how.get("path", "total"), steps=how.get("steps", 5)
    )
    found = score_encoded(
        model, _sample(data, max_examples, seed), baseline, by, request, quiet=True
    )
    return scores.mean.cpu() - found.heads.mean(0).cpu()


def _scored(source: Task, scores: HeadScores) -> list[Example] | None:
    """The examples that were scored, if the task still has them."""
    known = examples_by_id(source)
    found = [known[name] for name in scores.example_ids if name in known]
    return found if len(found) == len(scores.example_ids) else None


def _sample(data: Encoded, n: int, seed: int) -> Encoded:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    return data.take(sorted(order[:n].tolist()))


def pulled_heads(by: str, *, layers: bool = False) -> Callable[[HookedModel, Choice], Circuit]:
    """Make a strategy's choice of as many heads as the circuit has."""

    def choose(model: HookedModel, choice: Choice) -> Circuit:
        if by == "lost-relevance":
            values = _lost(model, choice)
        else:
            values = head_pull(model, choice.target, by, seed=choice.seed)
        return _chosen(values, len(choice.circuit), f"{by} on the target", layers=layers)

    return choose


def changed_layers(model: HookedModel, choice: Choice) -> dict[int, float]:
    """Of every layer, how much the relevance of its heads differs between source and target.

    CircuitLoRA (arXiv 2502.11812) gives layers whose edges change in fine-tuning a higher rank;
    here it is the nodes, before any training.
    """
    return dict(enumerate(_lost(model, choice).abs().sum(1).tolist()))


def relevant_layers(model: HookedModel, choice: Choice) -> dict[int, float]:
    """Of every layer of the circuit, the relevance of its heads, where it is positive."""
    scores = choice.ranked.mean
    weight: dict[int, float] = {}
    for head in choice.circuit:
        gain = max(0.0, float(scores[head.layer, head.index]))
        weight[head.layer] = weight.get(head.layer, 0.0) + gain
    return weight


def _lost(model: HookedModel, choice: Choice) -> Float[Tensor, "layer head"]:
    if choice.source is None:
        raise InputError("Lost relevance compares with the source: pass source=….")
    return lost_relevance(model, choice.target, choice.source, choice.ranked, seed=choice.seed)


def _chosen(values: Float[Tensor, "layer head"], size: int, why: str, *, layers: bool) -> Circuit:
    n_layers, n_heads = values.shape
    if layers:
        # Of a layer that does not fit the best heads.
        values = by_layer(values)
        why = f"{why}, by layer"
    order = values.flatten().argsort(descending=True, stable=True)[:size].tolist()
    heads = [Head(*divmod(i, n_heads)) for i in order]
    return replace(Circuit.of(heads, n_layers, n_heads), selection=f"top {size} by {why}")


def by_layer(values: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
    """Ranks in which every head of a layer comes before all heads of a layer with a smaller sum."""
    place = values.sum(1).argsort(stable=True).argsort().float()
    within = values.argsort(dim=1, stable=True).argsort(dim=1).float() / values.shape[1]
    return place[:, None] + within
