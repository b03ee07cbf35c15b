"""Relevance by difference: patch a source, hold what is frozen, run the layers above it.

1. The clean run leaves the residual stream, z and the frozen parts (the operating point).
2. For the heads of layer l, the batch is laid out once per head; the run starts at layer l from
   the cached residual stream, and each copy has its head's output replaced by the mean.
3. β at the output is the output of the frozen network without a patch minus that of the copy.
   (Not the clean output: the same values computed through held scales round differently, which in
   bfloat16 would drown the small heads.)

With patterns and norm scales frozen this is CD-T's propagation with β' = f(t) − f(t − β) at
activations and biases left with γ; with nothing frozen it is exact mean ablation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.batch import Batch, Positions, task_margin
from circuitlens.cdt.operating_point import OperatingPoint
from circuitlens.cdt.rules import RuleSet
from circuitlens.model import Hook, HookedModel

__all__ = ["relevance_by_difference"]


@torch.no_grad()
def relevance_by_difference(
    model: HookedModel,
    batch: Batch,
    mean: Float[Tensor, "layer head d_head"],
    rules: RuleSet,
    *,
    positions: Positions = "all",
    rows: int = 256,
) -> Float[Tensor, "batch layer head"]:
    """How far β of each head moves the task margin, in logits.

    Args:
        model: the model.
        batch: prompts.
        mean: the baseline μ.
        rules: what is frozen; the activation must go by ``difference``.
        positions: where the head deviates from its mean.
        rows: prompts that go through the model at once; sets memory, not the result.
    """
    g = model.geometry
    clean = OperatingPoint.capture(model, batch, rules)
    frozen = clean.hooks()
    margin = task_margin(model.logits(batch, frozen) if frozen else clean.logits, batch)
    where = batch.mask(positions)
    scores = torch.empty(len(batch), g.n_layers, g.n_heads, dtype=margin.dtype, device=model.device)
    together = max(1, rows // len(batch))
    for layer in range(g.n_layers):
        for start in range(0, g.n_heads, together):
            heads = range(start, min(start + together, g.n_heads))
            copies = batch.repeat(len(heads))
            hooks = clean.hooks(from_layer=layer, times=len(heads))
            hooks[model.z_hook(layer)] = _patch(clean.z[layer], mean[layer], where, heads)
            residual = clean.residuals[layer].repeat(len(heads), 1, 1)
            with model.starting_at(layer, residual):
                patched = task_margin(model.logits(copies, hooks), copies)
            scores[:, layer, start : start + len(heads)] = (
                margin[:, None] - patched.unflatten(0, (len(heads), len(batch))).T
            )
    return scores


def _patch(
    z: Float[Tensor, "batch pos head d_head"],
    mean: Float[Tensor, "head d_head"],
    where: Tensor,
    heads: range,
) -> Hook:
    """Replace head ``heads[c]`` by its mean in copy c of the batch; the others stay clean."""
    copies = z.expand(len(heads), *z.shape).clone()
    for copy, head in enumerate(heads):
        copies[copy, :, :, head][where] = mean[head].to(z)
    flat = copies.flatten(0, 1)
    return lambda _: flat
