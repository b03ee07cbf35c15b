"""The operating point: what the clean run leaves for later runs to hold on to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitlens.batch import Batch
from circuitlens.cdt.rules import RuleSet
from circuitlens.errors import UnsupportedModelError
from circuitlens.model import Hook, HookedModel

__all__ = ["OperatingPoint"]


@dataclass(frozen=True)
class OperatingPoint:
    """Clean values of one batch.

    Attributes:
        logits: at the decision position.
        frozen: patterns and norm scales that the rules hold, by hook name.
        residuals: the residual stream entering each layer of interest.
        z: head outputs, one tensor a layer.
    """

    logits: Float[Tensor, "batch d_vocab"]
    frozen: dict[str, Tensor]
    residuals: dict[int, Float[Tensor, "batch pos d_model"]]
    z: dict[int, Float[Tensor, "batch pos head d_head"]]

    @classmethod
    @torch.no_grad()
    def capture(cls, model: HookedModel, batch: Batch, rules: RuleSet) -> OperatingPoint:
        """Run ``batch`` and keep what ``rules`` freeze, the residual stream and z."""
        layers = range(model.geometry.n_layers)
        frozen: dict[str, Tensor] = {}
        residuals: dict[int, Tensor] = {}
        z: dict[int, Tensor] = {}

        def into(store: dict[str, Tensor] | dict[int, Tensor], key: str | int) -> Hook:
            def hook(activation: Tensor) -> None:
                store[key] = activation.detach()  # type: ignore[index]

            return hook

        hooks: dict[str, Hook] = {}
        for name in frozen_hooks(model, rules):
            hooks[name] = into(frozen, name)
        for layer in layers:
            hooks[f"blocks.{layer}.hook_in"] = into(residuals, layer)
            hooks[model.z_hook(layer)] = into(z, layer)
        logits = model.logits(batch, hooks)
        return cls(logits, frozen, residuals, z)

    def hooks(self, *, from_layer: int = 0, times: int = 1) -> dict[str, Hook]:
        """Hooks that hold the frozen values in a later run.

        Args:
            from_layer: leave out what lies in layers below, which such a run does not compute.
            times: the run has the batch's rows this many times over.
        """

        def hold(value: Tensor) -> Hook:
            def hook(activation: Tensor) -> Tensor:
                if times == 1:
                    return value
                return value.expand(times, *value.shape).flatten(0, 1)

            return hook

        return {
            name: hold(value)
            for name, value in self.frozen.items()
            if _layer_of(name) is None or (_layer_of(name) or 0) >= from_layer
        }


def _layer_of(hook: str) -> int | None:
    parts = hook.split(".")
    return int(parts[1]) if parts[0] == "blocks" else None


def frozen_hooks(model: HookedModel, rules: RuleSet) -> Iterable[str]:
    """Names of the hooks that ``rules`` freeze in ``model``.

    Raises:
        UnsupportedModelError: if the model does not have one in every layer.
    """
    names: list[str] = []
    for suffix, wanted in (
        (".hook_pattern", rules.freeze_patterns),
        (".hook_scale", rules.freeze_scales),
    ):
        if not wanted:
            continue
        found = [name for name in model.bridge.hook_dict if name.endswith(suffix)]
        layers = {_layer_of(name) for name in found}
        if missing := set(range(model.geometry.n_layers)) - layers:
            raise UnsupportedModelError(
                f"Layer {min(missing)} of {model.name} has no {suffix[1:]} to freeze, which the "
                f"rules {rules.name!r} need."
            )
        names += found
    return names
