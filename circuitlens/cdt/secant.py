"""Activations as linear maps: the secant through the clean run.

The map has the value of the activation at the clean run and another slope:

    ungated  act(t)    →  c_u·t,         c_u = act(t)/t
    gated    act(g)·u  →  c_g·g + c_u·u, c_g = ½ act(g)/g · u,  c_u = ½ act(g)

with the coefficients taken from the clean run. So a gated product is shared equally between its
factors; these are the coefficients of Relevance Patching (RelP, arXiv 2508.21258). A cap on the
logits (Gemma 2) counts as an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.activations import ACT2FN

from circuitlens.errors import UnsupportedModelError
from circuitlens.models.batch import Batch, at_least_float32
from circuitlens.models.families import ActivationSite
from circuitlens.models.hooked import Forward, HookedModel
from circuitlens.models.hooks import Hook, then

__all__ = ["Secant", "activation_sites", "capped_labels", "secant", "site_hooks"]


@dataclass(frozen=True)
class Secant:
    """Coefficients of one activation: its value is ``up·c_u``, and ``gate·c_g`` if gated."""

    up: Float[Tensor, "*shape"]
    gate: Float[Tensor, "*shape"] | None

    def __call__(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Apply the linear map."""
        value = self.up * up
        return value if self.gate is None or gate is None else value + self.gate * gate

    def map(self, function: Callable[[Tensor], Tensor]) -> Secant:
        """Change the shape of the coefficients."""
        return Secant(function(self.up), None if self.gate is None else function(self.gate))


def activation_sites(model: HookedModel) -> tuple[ActivationSite, ...]:
    """All activations between the heads and the logits.

    Raises:
        UnsupportedModelError: if one has no hooks around it.
    """
    hooks = model.bridge.hook_dict
    sites = model.activations()
    for site in sites:
        for name in (site.post, site.up, site.gate):
            if name is not None and name not in hooks:
                raise UnsupportedModelError(
                    f"{type(model.hf).__name__} has no hook {name} at its activation, so "
                    "cdt-linear does not know its secant: use method='cdt' or 'ablation'."
                )
    return sites


def site_hooks(
    site: ActivationSite, at: Callable[[Tensor, Tensor, Tensor | None], Tensor | None]
) -> dict[str, Hook]:
    """Hooks that call ``at(post, up, gate)`` when the activation is due."""
    seen: dict[str, Tensor] = {}

    def see(name: str) -> Hook:
        def hook(value: Tensor) -> None:
            seen[name] = value

        return hook

    def due(post: Tensor) -> Tensor | None:
        return at(post, seen.pop(site.up), seen.pop(site.gate) if site.gate else None)

    inputs = [name for name in (site.up, site.gate) if name]
    return {name: see(name) for name in inputs} | {site.post: due}


def secant(
    model: HookedModel, site: ActivationSite, post: Tensor, up: Tensor, gate: Tensor | None
) -> Secant:
    """The secant of an activation through its clean values.

    Raises:
        UnsupportedModelError: if the values are not those of a gated activation as configured.
    """
    if gate is None:
        return Secant(_ratio(post, up), None)
    act = _activation(model)(gate)
    _check_value(model, site, act * up, post)
    return Secant(0.5 * act, 0.5 * (_ratio(act, gate) * up))


def capped_labels(
    model: HookedModel,
    batch: Batch,
    hooks: dict[str, Hook],
    forward: Forward,
    cap: Float[Tensor, "batch label"] | None = None,
) -> tuple[Float[Tensor, "batch label"], Float[Tensor, "batch label"] | None]:
    """Label scores with a cap on them (Gemma 2's on logits) as a linear map too, its secant.

    Args:
        model: the model.
        batch: prompts.
        hooks: of the run.
        forward: what makes logits.
        cap: coefficients of an earlier, clean run; without them this run is the clean one.

    Returns:
        The logits and the coefficients, or ``None`` where the model has no cap.
    """
    before = batch.readout.uncapped(model)
    if before is None:
        return forward(batch, hooks), None
    name, pick = before
    uncapped: list[Tensor] = []

    def see(logits: Tensor) -> None:
        uncapped.append(pick(logits))

    then(hooks, name, see)
    labels = at_least_float32(forward(batch, hooks))
    if cap is None:
        cap = _ratio(labels.detach(), uncapped[0].detach(), at_zero=1.0)
    return uncapped[0] * cap, cap


def _ratio(value: Tensor, argument: Tensor, at_zero: float = 0.5) -> Tensor:
    """f(t)/t; at t = 0 the slope there, which is ½ for a smooth activation."""
    safe = torch.where(argument == 0, torch.ones_like(argument), argument)
    return torch.where(argument == 0, torch.full_like(value, at_zero), value / safe)


def _activation(model: HookedModel) -> torch.nn.Module:
    config = model.hf.config.get_text_config()
    for key in ("hidden_activation", "hidden_act", "activation_function"):
        name = getattr(config, key, None)
        if name in ACT2FN:
            return cast(torch.nn.Module, ACT2FN[name])
    raise UnsupportedModelError(
        f"The configuration of {model.name} has no activation function that we know."
    )


def _check_value(model: HookedModel, site: ActivationSite, expected: Tensor, post: Tensor) -> None:
    """Verify that the MLP really is what the secant assumes."""
    eps = torch.finfo(post.dtype).eps
    if post.dtype in (torch.bfloat16, torch.float16):
        # 64 roundings would be half of the value. They cancel in the root mean square.
        difference = (expected.float() - post.float()).square().mean().sqrt()
        size, tolerance = post.float().square().mean().sqrt(), 4 * eps
    else:
        difference, size = (expected - post).abs().max(), post.abs().max()
        tolerance = 64 * eps
    if difference > tolerance * size.clamp(min=1e-3):
        raise UnsupportedModelError(
            f"The activation before {site.post} in {type(model.hf).__name__} is not act(gate)·up "
            f"with the configured activation (off by {float(difference):.1e}): use method='cdt' or "
            "'ablation'."
        )
