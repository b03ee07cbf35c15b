"""Relevance in circuits: gradient × deviation where other heads are at their means.

Every head has a gate: z ← μ + gate · (z − μ), 1 for a head that is kept and 0 for one that is at
its mean, and each example its own gates, so that one pass sees as many circuits as there are
examples. The relevance of a head is ⟨z − μ, ∂margin/∂z⟩ there: to first order what a kept head is
needed for, and what a head that is away would add.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.cdt.gradient import LinearisedRun, project
from circuitlens.cdt.relevances import Relevances
from circuitlens.cdt.rules import RuleSet
from circuitlens.models.batch import Batch, Positions, margin
from circuitlens.models.hooked import HookedModel
from circuitlens.node_means import NodeMeans

__all__ = ["relevance_in_circuits"]


@torch.enable_grad()
def relevance_in_circuits(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    gates: Float[Tensor, "batch layer head"],
    rules: RuleSet,
    positions: Positions = "all",
) -> Relevances:
    """Relevance of every head for the task margin of each example, in that example's circuit.

    Args:
        model: the model.
        batch: prompts.
        means: the baseline μ.
        gates: of every head, for each example.
        rules: what is frozen; the activation must go by ``gradient`` or ``secant``.
        positions: where heads deviate from their means; relevance is summed over them.
    """
    where, means = batch.mask(positions), means.on(model, batch)
    layer_of = {model.z_hook(layer): layer for layer in range(model.geometry.n_layers)}
    of_rows = gates.to(model.device).repeat_interleave(batch.n_rows, 0)

    def move(name: str, z: Tensor) -> Tensor:
        mean = means.of_heads(layer_of[name], z)
        gate = of_rows[:, layer_of[name]].to(z.dtype)[:, None, :, None]
        return torch.where(where[:, :, None, None], mean + gate * (z - mean), z)

    run = LinearisedRun(model, batch, rules, move=move)
    gradients = run.gradients(margin(run.labels, batch.gold).sum())
    found = project(model, batch, run.outputs, gradients, means, where, False, False)
    return Relevances(found.heads.detach(), None, None)
