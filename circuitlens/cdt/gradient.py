"""Relevance by gradient: one forward and one backward pass for every head at every position.

1. Forward with frozen parts held as constants, so that no gradient passes through them. For the
   ``secant`` the activations are replaced by maps with the same value and another slope:

       gated    act(g)·u  →  ½ (act(g)/g · u)·g  +  ½ act(g)·u      (brackets constant, each in
       ungated  act(t)    →  (act(t)/t)·t                            turn linear in g, u or t)

2. Backward from the task margin to the output z of every head.
3. Relevance of a head at a position is ⟨z − μ, ∂margin/∂z⟩: β is linear in the source, so this
   *is* its β at the margin.

The secant coefficients are those of Relevance Patching (RelP, arXiv 2508.21258); gradient with
nothing frozen is attribution patching.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from circuitlens.batch import Batch, Positions, task_margin
from circuitlens.cdt.operating_point import (
    OperatingPoint,
    apply_pattern,
    frozen_scales,
    pattern_hook,
    then,
)
from circuitlens.cdt.rules import RuleSet
from circuitlens.errors import UnsupportedModelError
from circuitlens.model import Hook, HookedModel

__all__ = ["relevance_by_gradient"]


def relevance_by_gradient(
    model: HookedModel,
    batch: Batch,
    mean: Float[Tensor, "layer head d_head"],
    rules: RuleSet,
    *,
    positions: Positions = "all",
) -> Float[Tensor, "batch layer head"]:
    """How far β of each head moves the task margin in the linearised network, in logits.

    Args:
        model: the model.
        batch: prompts.
        mean: the baseline μ.
        rules: what is frozen; the activation must go by ``gradient`` or ``secant``.
        positions: where heads deviate from their means; relevance is summed over them.
    """
    by_position = relevance_by_position(model, batch, mean, rules)
    return torch.einsum("blph,bp->blh", by_position, batch.mask(positions).to(by_position))


def relevance_by_position(
    model: HookedModel,
    batch: Batch,
    mean: Float[Tensor, "layer head d_head"],
    rules: RuleSet,
) -> Float[Tensor, "batch layer pos head"]:
    """Relevance of every head at every position (padding included, where it is 0 or unread)."""
    layers = range(model.geometry.n_layers)
    z: dict[int, Tensor] = {}
    leaves: dict[int, Tensor] = {}

    def tap(layer: int) -> Hook:
        def hook(activation: Tensor) -> Tensor:
            z[layer] = activation.detach()
            # A zero that is added has the gradient of z itself. With the weights' gradients
            # off, the graph begins at the first of them and holds nothing for the weights.
            leaves[layer] = torch.zeros_like(z[layer], requires_grad=True)
            return activation + leaves[layer]

        return hook

    hooks: dict[str, Hook] = {}
    if rules.freeze_scales:
        hooks |= dict.fromkeys(frozen_scales(model), torch.Tensor.detach)
    if rules.freeze_patterns:
        hooks |= _freeze_patterns(model, batch, rules)
    for layer in layers:
        then(hooks, model.z_hook(layer), tap(layer))
    if rules.activation == "secant":
        for layer in layers:
            hooks |= _secant(model, layer)
    with torch.enable_grad(), _weights_without_gradient(model):
        margin = task_margin(model.logits(batch, hooks), batch)
        gradients = torch.autograd.grad(margin.sum(), [leaves[layer] for layer in layers])
    return torch.stack(
        [
            # bf16 models: the products are summed in float32, as all statistics are.
            ((z[layer] - mean[layer].to(z[layer])).to(margin) * gradients[layer].to(margin)).sum(-1)
            for layer in layers
        ],
        dim=1,
    )


def _freeze_patterns(model: HookedModel, batch: Batch, rules: RuleSet) -> dict[str, Hook]:
    """Hooks that make attention patterns constants of the clean run, which this run is."""
    hooks: dict[str, Hook] = {}
    if not model.pattern_before_z:
        # The present run's pattern comes too late to be used, so it takes a run of its own.
        return OperatingPoint.capture(model, batch, rules).pattern_hooks()
    for layer in range(model.geometry.n_layers):
        patterns: list[Tensor] = []

        def see(pattern: Tensor, patterns: list[Tensor] = patterns) -> None:
            patterns[:] = [pattern.detach()]

        hooks[pattern_hook(layer)] = see
        hooks |= apply_pattern(layer, patterns.pop)
    return hooks


def _secant(model: HookedModel, layer: int) -> dict[str, Hook]:
    """Hooks that give the activation of one MLP its secant slope and keep its value."""
    mlp = f"blocks.{layer}.mlp"
    names = model.bridge.hook_dict
    if f"{mlp}.in.hook_out" not in names or f"{mlp}.out.hook_in" not in names:
        raise UnsupportedModelError(
            f"{type(model.hf).__name__} has no hooks round the activation of {mlp}, so "
            "cdt-linear does not know its secant: use method='cdt' or 'ablation'."
        )
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Hook:
        def hook(value: Tensor) -> None:
            seen[name] = value

        return hook

    gated = f"{mlp}.gate.hook_out" in names
    activation = _activation(model) if gated else None

    def replace(post: Tensor) -> Tensor:
        linear: Tensor
        up = seen["up"]
        if activation is not None:
            gate = seen["gate"]
            t, u = gate.detach(), up.detach()
            act = activation(t)
            _check_value(model, mlp, act * u, post.detach())
            linear = 0.5 * (_ratio(act, t) * u) * gate + 0.5 * act * up
        else:
            linear = _ratio(post.detach(), up.detach()) * up
        return post.detach() + (linear - linear.detach())

    hooks = {f"{mlp}.in.hook_out": see("up"), f"{mlp}.out.hook_in": replace}
    return {f"{mlp}.gate.hook_out": see("gate"), **hooks} if gated else hooks


def _ratio(value: Tensor, argument: Tensor) -> Tensor:
    """act(t)/t; at t = 0, where a smooth activation has slope ½, that slope."""
    safe = torch.where(argument == 0, torch.ones_like(argument), argument)
    return torch.where(argument == 0, torch.full_like(value, 0.5), value / safe)


def _activation(model: HookedModel) -> torch.nn.Module:
    config = model.hf.config.get_text_config()
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if name in ACT2FN:
            return cast(torch.nn.Module, ACT2FN[name])
    raise UnsupportedModelError(
        f"The configuration of {model.name} names no activation function that we know."
    )


def _check_value(model: HookedModel, mlp: str, linear: Tensor, post: Tensor) -> None:
    """Make sure that the MLP really is what the secant assumes."""
    tolerance = 64 * torch.finfo(post.dtype).eps
    error = (linear - post).abs().max()
    if error > tolerance * post.abs().max().clamp(min=1e-3):
        raise UnsupportedModelError(
            f"The activation of {mlp} in {type(model.hf).__name__} is not act(gate)·up with the "
            f"configured activation (off by {float(error):.1e}): use method='cdt' or 'ablation'."
        )


@contextmanager
def _weights_without_gradient(model: HookedModel) -> Iterator[None]:
    wanted = [p for p in model.hf.parameters() if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
