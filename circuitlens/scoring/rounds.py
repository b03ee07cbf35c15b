"""Scorers that look again: what a head does once the heads below it are at their means.

What a head does in the whole model is not what it does in a small circuit: other heads make up for
it, or need it to be there. So the ranking of a cheap scorer says which circuits to look at, and
gradients in these say how to rank.

``sampled``:
    1. Rank heads by ``cdt-linear``.
    2. Each example gets a circuit: the top n heads, n drawn evenly between none and all, so that a
       pass sees as many circuits as there are examples. Ranks are shaken a little, so that
       neighbours do not always come together, and edges are blurred: heads near the edge of the
       circuit are partly kept, by a width that is drawn for each example.
    3. Relevance of every head in its example's circuit (:mod:`circuitlens.cdt.gated`), nothing
       frozen, weighted by exp(−d²), where d is its distance from the edge in units of 0.35 of the
       number of heads: what matters is whether a head should be in circuits of about its rank.
    4. Rank by the mean of old and new rank, and so on. The score is the weighted mean of all
       rounds, in logits.

``iterative``: score by ``cdt-linear``, set the worst share of the heads to their means, score the
others in what is left, and so on: backward elimination in a few passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.cdt import RULES, relevance_by_gradient
from circuitlens.cdt.gated import relevance_in_circuits
from circuitlens.models.batch import Batch
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans
from circuitlens.scoring.request import Request, Scored

__all__ = ["iterative", "sampled"]

# Shares of the number of heads; chosen on toy models, checked on others (docs/results.md).
_WIDTH = 0.35
_SHAKEN = 0.1
_BLURRED = 0.6


def ranks(scores: Float[Tensor, "*node"]) -> Float[Tensor, " flat"]:
    """Place of every node in the ranking, 0 for the largest score."""
    order = scores.flatten().argsort(descending=True, stable=True)
    places = torch.empty(len(order), dtype=torch.float64)
    places[order] = torch.arange(len(order), dtype=torch.float64)
    return places


def sampled(
    model: HookedModel, batches: Sequence[Batch], means: NodeMeans, request: Request
) -> Scored:
    """Rank heads by what they do in random circuits of the ranking so far (module docstring)."""
    g = model.geometry
    n, n_examples = len(g), sum(map(len, batches))
    generator = torch.Generator().manual_seed(request.seed)
    at = request.positions
    first = [
        relevance_by_gradient(model, batch, means, RULES["cdt-linear"], positions=at).heads
        for batch in batches
    ]
    place = ranks(torch.cat(first).detach().cpu().double().mean(0))
    weighted = torch.zeros(n_examples, n, dtype=torch.float64)
    weights = torch.zeros(n_examples, n, dtype=torch.float64)
    for _ in range(request.rounds):
        edge = _edges(n_examples, n, generator)
        noise = torch.randn(n_examples, n, generator=generator).double() * _SHAKEN * n
        own = (place + noise).argsort(1).argsort(1).double() + 0.5
        inside = edge[:, None] - own
        blur = torch.rand(n_examples, 1, generator=generator).double() * _BLURRED * n
        gates = (inside / blur + 0.5).clamp(0, 1).float().view(-1, g.n_layers, g.n_heads)
        found = _in_circuits(model, batches, means, gates, request, "attribution")
        weight = _weight(inside, n)
        weighted += weight * found
        weights += weight
        place = ranks(-(place + ranks(weighted.sum(0) / weights.sum(0))))
    # Their mean over examples is the weighted mean of all.
    each = weighted / weights.mean(0)
    shaped = each.view(-1, g.n_layers, g.n_heads).float()
    return Scored(shaped, {"cdt-linear": torch.cat(first)})


def _edges(n_examples: int, n: int, generator: torch.Generator) -> Float[Tensor, " example"]:
    """Sizes of circuits, one in each of as many equal parts of 0 to n, in a random order."""
    spread = torch.randperm(n_examples, generator=generator).double()
    return (spread + torch.rand(n_examples, generator=generator).double()) / n_examples * n


def _weight(inside: Float[Tensor, "example node"], n: int) -> Float[Tensor, "example node"]:
    """How much a head counts by how far inside the circuit's edge it lies."""
    return torch.exp(-((inside / (_WIDTH * n)) ** 2))


def iterative(
    model: HookedModel, batches: Sequence[Batch], means: NodeMeans, request: Request
) -> Scored:
    """Rank heads by elimination in rounds; scores are shares of heads that went before."""
    g = model.geometry
    n, n_examples = len(g), sum(map(len, batches))
    keep = torch.ones(n)
    gone: list[int] = []
    while len(gone) < n:
        gates = keep.expand(n_examples, -1).view(-1, g.n_layers, g.n_heads)
        score = _in_circuits(model, batches, means, gates, request, "cdt-linear").mean(0)
        left = [int(i) for i in score.argsort(stable=True) if keep[i]]
        # The last tenth has been ranked well enough by then.
        last = len(left) <= max(1, round(0.1 * n))
        worst = left if last else left[: max(1, round(request.share * len(left)))]
        gone += worst
        keep[worst] = 0
    scores = torch.empty(n)
    scores[gone] = torch.arange(n) / n
    return Scored(scores.view(g.n_layers, g.n_heads))


def _in_circuits(
    model: HookedModel,
    batches: Sequence[Batch],
    means: NodeMeans,
    gates: Float[Tensor, "example layer head"],
    request: Request,
    rules: str,
) -> Float[Tensor, "example node"]:
    """Relevance of all heads in each example's circuit."""
    found = []
    for batch, own in zip(batches, gates.split([len(b) for b in batches]), strict=True):
        part = relevance_in_circuits(model, batch, means, own, RULES[rules], request.positions)
        found.append(part.heads.flatten(1).cpu().double())
    return torch.cat(found)
