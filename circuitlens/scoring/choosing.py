"""``auto``: let measured circuits choose among cheap rankings.

No cheap ranking is best on every model, but it is cheap to ask: the top quarter, half and three
quarters of each ranking are kept, all other heads are at their means, and the ranking with the
largest mean f on the *discovery* examples is used. Three forward passes per ranking cost as much
as one forward and backward pass. Faithfulness is reported on other examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.cdt import RULES, FrozenNetwork, Source
from circuitlens.cdt.ablation import ablated_label_logits, head_mask
from circuitlens.models.batch import Batch, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans
from circuitlens.nodes import MLP, Head
from circuitlens.scoring.request import Request

__all__ = ["areas", "mlp_effects"]

SHARES = (0.25, 0.5, 0.75)


def mlp_effects(
    model: HookedModel, batch: Batch, means: NodeMeans, request: Request
) -> Float[Tensor, "batch layer"]:
    """Effect of ablating each MLP exactly: there are few of them."""
    where = batch.mask(request.positions)
    network = FrozenNetwork(model, batch, RULES["ablation"], reach=where)
    sets = [[Source(MLP(layer), where)] for layer in range(model.geometry.n_layers)]
    labels, _ = network.patched(sets, means, request.budget)
    return (margin(network.labels, batch.gold) - margin(labels, batch.gold)).T


def areas(
    model: HookedModel,
    batches: Sequence[Batch],
    means: NodeMeans,
    request: Request,
    rankings: Mapping[str, Float[Tensor, "layer head"]],
) -> dict[str, float]:
    """Mean f of the circuits of three sizes, for each ranking; NaN where f has no meaning."""
    g = model.geometry
    heads = list(g)
    masks = [torch.zeros(g.n_layers, g.n_heads, dtype=torch.bool)]
    for scores in rankings.values():
        order = scores.flatten().argsort(descending=True, stable=True).tolist()
        for share in SHARES:
            top: list[Head] = [heads[i] for i in order[: round(share * len(g))]]
            masks.append(head_mask(top, g.n_layers, g.n_heads))
    # Equal circuits of two rankings run once; the whole model comes with the clean run.
    distinct, place = torch.stack(masks).to(torch.uint8).unique(dim=0, return_inverse=True)
    keeps = torch.cat([distinct.bool(), torch.ones(1, g.n_layers, g.n_heads, dtype=torch.bool)])
    total = torch.zeros(len(keeps), dtype=torch.float64)
    for batch in batches:
        labels = ablated_label_logits(
            model, batch, keeps, means, request.positions, rows=request.budget
        )
        total += margin(labels, batch.gold).double().sum(1).cpu()
    margins, full = total[:-1][place], total[-1]
    f = (margins[1:] - margins[0]) / (full - margins[0])
    found = f.view(len(rankings), -1).mean(1).tolist()
    return dict(zip(rankings, found, strict=True))
