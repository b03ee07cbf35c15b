"""Relevance by gradient: one forward and one backward pass for every node at every position.

1. Forward with frozen parts held as constants, so that no gradient passes through them. For the
   ``secant`` the activations are replaced by maps with the same value and another slope
   (:mod:`circuitlens.cdt.secant`).
2. Backward from the task margin to the output of every head (z) and every MLP.
3. Relevance of a node at a position is ⟨output − μ, ∂margin/∂output⟩: β is linear in the source,
   so this *is* its β at the margin.

By ``total`` paths β passes through later heads and MLPs. By ``direct`` paths later nodes are held
at their clean values: their outputs are constants too. If MLPs are nodes only the residual stream
and the norms are left; if not, MLPs are passed. Direct relevances of all nodes add up to what the
margin of the linearised network loses when every node is at its mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitlens.cdt.operating_point import frozen_routing, frozen_scales
from circuitlens.cdt.relevances import Relevances
from circuitlens.cdt.rules import RuleSet
from circuitlens.cdt.secant import activation_sites, capped_labels, secant, site_hooks
from circuitlens.errors import check_choice
from circuitlens.models.batch import Batch, Positions, at_least_float32, margin
from circuitlens.models.families import ActivationSite
from circuitlens.models.freezing import gradients
from circuitlens.models.hooked import Forward, HookedModel
from circuitlens.models.hooks import Hook, then
from circuitlens.models.passes import count_backward
from circuitlens.node_means import NodeMeans

__all__ = ["LinearisedRun", "Path", "relevance_by_gradient"]

Path = Literal["total", "direct"]


class LinearisedRun:
    """A clean forward pass whose graph is that of the linearised network.

    Attributes:
        labels: label logits, with a graph.
        live: outputs of the nodes by hook name, with a graph.
        outputs: the same as constants.
        leaves: where the gradients of the nodes' outputs arrive, by hook name.
    """

    def __init__(
        self,
        model: HookedModel,
        batch: Batch,
        rules: RuleSet,
        *,
        mlps: bool = False,
        hold: Bool[Tensor, "batch pos"] | None = None,
        move: Callable[[str, Tensor], Tensor] | None = None,
        all_logits: bool = False,
        nodes: Sequence[str] | None = None,
    ) -> None:
        """Run the batch.

        Args:
            model: the model.
            batch: prompts.
            rules: what is frozen; the activation must go by ``gradient`` or ``secant``.
            mlps: MLPs are nodes too.
            hold: positions at which nodes pass nothing on, for direct paths.
            move: changes the output of a node (by hook name) before it is read by the next.
            all_logits: ``labels`` are all logits, not only those of labels.
            nodes: hooks at the nodes, if these are neither heads nor MLPs.
        """
        self.model = model
        self.leaves: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.live: dict[str, Tensor] = {}
        layers = range(model.geometry.n_layers)
        if nodes is None:
            nodes = [model.z_hook(layer) for layer in layers]
            nodes += [model.mlp_hook(layer) for layer in layers if mlps]

        def tap(name: str) -> Hook:
            def hook(output: Tensor) -> Tensor:
                self.live[name] = output
                self.outputs[name] = output.detach()
                # A zero that is added has the gradient of the output itself. With the weights'
                # gradients off, the graph begins at the first of them and holds nothing for the
                # weights.
                leaf = torch.zeros_like(self.outputs[name], requires_grad=True)
                self.leaves[name] = leaf
                if move is not None:
                    output = move(name, output)
                if hold is not None:
                    where = hold.reshape(*hold.shape, *[1] * (output.ndim - 2))
                    output = torch.where(where, output.detach(), output)
                return output + leaf

            return hook

        constants = [
            *frozen_scales(model, rules),
            *frozen_routing(model, rules),
            *_frozen_patterns(model, rules),
        ]
        hooks: dict[str, Hook] = dict.fromkeys(constants, torch.Tensor.detach)
        if rules.activation == "secant":
            for site in activation_sites(model):
                hooks |= _secant_slope(model, site)
        for name in nodes:
            then(hooks, name, tap(name))
        with torch.enable_grad(), gradients(model.hf, wanted=False):
            forward: Forward = model.logits if all_logits else model.label_logits
            if rules.activation == "secant":
                self.labels, _ = capped_labels(model, batch, hooks, forward)
            else:
                self.labels = forward(batch, hooks)

    def gradients(self, objective: Float[Tensor, ""], *, keep: bool = False) -> dict[str, Tensor]:
        """Gradients of a scalar at the nodes' outputs, by hook name (0 where it has none)."""
        count_backward(len(next(iter(self.leaves.values()))))
        found = torch.autograd.grad(
            objective,
            list(self.leaves.values()),
            retain_graph=keep,
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(self.leaves[name]) if gradient is None else gradient
            for name, gradient in zip(self.leaves, found, strict=True)
        }


@torch.enable_grad()
def relevance_by_gradient(
    model: HookedModel,
    batch: Batch,
    means: NodeMeans,
    rules: RuleSet,
    *,
    positions: Positions = "all",
    mlps: bool = False,
    by_position: bool = False,
    path: Path = "total",
) -> Relevances:
    """How far β of each node moves the task margin in the linearised network, in logits.

    Args:
        model: the model.
        batch: prompts.
        means: the baseline μ.
        rules: what is frozen; the activation must go by ``gradient`` or ``secant``.
        positions: where nodes deviate from their means; relevance is summed over them.
        mlps: MLPs are nodes too.
        by_position: return the relevance of every head at every single position too.
        path: ``"total"`` or ``"direct"`` (module docstring).

    Raises:
        InputError: for another path.
    """
    check_choice("path", path, get_args(Path))
    where, means = batch.mask(positions), means.on(model, batch)
    hold = where if path == "direct" else None
    run = LinearisedRun(model, batch, rules, mlps=mlps, hold=hold)
    gradients = run.gradients(margin(run.labels, batch.gold).sum())
    return project(model, batch, run.outputs, gradients, means, where, mlps, by_position)


def project(
    model: HookedModel,
    batch: Batch,
    outputs: dict[str, Tensor],
    gradients: dict[str, Tensor],
    means: NodeMeans,
    where: Bool[Tensor, "row pos"],
    mlps: bool,
    by_position: bool,
) -> Relevances:
    """Project the nodes' deviations from their means on gradients, and sum over positions.

    A prompt that is in several rows is one activation, and its gradient the sum of theirs.
    """
    at, of_mlps = [], []

    def products(output: Tensor, mean: Tensor, slope: Tensor) -> Tensor:
        # bf16 models: the products are summed in float32, as all statistics are.
        terms = at_least_float32(output - mean) * at_least_float32(slope)
        chosen = where.reshape(*where.shape, *[1] * (terms.ndim - 3))
        # Some models give NaN in the padding, and NaN · 0 is NaN.
        return torch.where(chosen, terms.sum(-1), 0.0)

    for layer in range(model.geometry.n_layers):
        z, slope = outputs[model.z_hook(layer)], gradients[model.z_hook(layer)]
        at.append(products(z, means.of_heads(layer, z), slope))
        if mlps:
            out, slope = outputs[model.mlp_hook(layer)], gradients[model.mlp_hook(layer)]
            of_mlps.append(products(out, means.of_mlp(layer, out), slope).sum(-1))
    heads = torch.stack(at, dim=2)
    return Relevances(
        batch.of_examples(heads.sum(1)),
        batch.of_examples(torch.stack(of_mlps, dim=1)) if mlps else None,
        heads if by_position else None,
    )


def _frozen_patterns(model: HookedModel, rules: RuleSet) -> list[str]:
    """Hooks at queries and keys: with these as constants, so are the patterns of this run."""
    if not rules.freeze_patterns:
        return []
    layers = range(model.geometry.n_layers)
    return [f"blocks.{layer}.attn.{part}.hook_out" for layer in layers for part in "qk"]


def _secant_slope(model: HookedModel, site: ActivationSite) -> dict[str, Hook]:
    """Hooks that give one activation its secant slope and keep its value."""

    def at(post: Tensor, up: Tensor, gate: Tensor | None) -> Tensor:
        value = post.detach()
        clean = None if gate is None else gate.detach()
        linear = secant(model, site, value, up.detach(), clean)(up, gate)
        return value + (linear - linear.detach())

    return site_hooks(site, at)
