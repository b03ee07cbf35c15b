"""Integrated gradients between the run with every head at its mean and the clean run.

1. For α in (0, 1) run the live network with every node's deviation scaled:
   output ← μ + α·(output − μ), at the chosen positions, layer after layer.
2. Relevance of a node is ⟨output − μ, ∂margin/∂output⟩, averaged over steps α = (k + ½)/steps.

Since α enters the margin through these scalings alone, the relevances of all nodes sum to
d margin/dα, and their mean over α to margin(clean) − margin(all nodes at their means): the
completeness axiom of integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365). One step is
the gradient at the midpoint.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from circuitlens.cdt.gradient import LinearisedRun, project
from circuitlens.cdt.relevances import Relevances
from circuitlens.cdt.rules import RULES
from circuitlens.errors import InputError
from circuitlens.models.batch import Batch, Positions, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans

__all__ = ["relevance_along_path"]


@torch.enable_grad()
def relevance_along_path(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    *,
    steps: int = 5,
    positions: Positions = "all",
    mlps: bool = False,
    by_position: bool = False,
) -> Relevances:
    """Integrated gradients of the task margin for every node, in logits.

    Args:
        model: the model.
        batch: prompts.
        means: the baseline μ.
        steps: forward and backward passes; 1 is the midpoint.
        positions: where nodes deviate from their means.
        mlps: MLPs are nodes too, and are scaled with the heads.
        by_position: return the relevance of every head at every single position too.

    Raises:
        InputError: if ``steps`` is not positive.
    """
    if steps < 1:
        raise InputError(f"Integrated gradients need at least one step, but steps is {steps}.")
    where, means = batch.mask(positions), means.on(model, batch)
    layers = range(model.geometry.n_layers)
    mean_of = {model.z_hook(layer): (means.of_heads, layer) for layer in layers}
    if mlps:
        mean_of |= {model.mlp_hook(layer): (means.of_mlp, layer) for layer in layers}

    def scaled(alpha: float, name: str, output: Tensor) -> Tensor:
        function, layer = mean_of[name]
        mean = function(layer, output)
        chosen = where.reshape(*where.shape, *[1] * (output.ndim - 2))
        return torch.where(chosen, mean + alpha * (output - mean), output)

    found: list[Relevances] = []
    for step in range(steps):
        alpha = (step + 0.5) / steps
        run = LinearisedRun(
            model,
            batch,
            RULES["attribution"],
            mlps=mlps,
            move=partial(scaled, alpha),
        )
        gradients = run.gradients(margin(run.labels, batch.gold).sum())
        found.append(project(model, batch, run.outputs, gradients, means, where, mlps, by_position))
    return Relevances(
        sum(r.heads for r in found) / steps,  # type: ignore[arg-type]
        sum(r.mlps for r in found) / steps if mlps else None,  # type: ignore[arg-type,misc]
        sum(r.by_position for r in found) / steps if by_position else None,  # type: ignore[arg-type,misc]
    )
