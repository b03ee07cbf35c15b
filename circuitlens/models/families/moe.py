"""Mixtures of experts: Mixtral and Qwen3-MoE."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from circuitlens.models.families.family import ActivationSite, Family

__all__ = ["MoEFamily"]


class MoEFamily(Family):
    """Layers whose MLP is a router and experts, perhaps among layers with a plain MLP."""

    def adapt(self, adapter: Any) -> None:
        """Hook what happens inside the experts."""
        super().adapt(adapter)
        # Deferred: it imports TransformerLens, which takes seconds.
        from circuitlens.models.families.experts import HookedExperts

        adapter.components["blocks"].submodules["mlp"].submodules["experts"] = HookedExperts()

    def mlp_output(self, layer: int) -> str:
        """Hook at the sum of the experts, or at the output of a plain MLP."""
        return f"blocks.{layer}.mlp.hook_out"

    def routing(self, layer: int, hooks: Collection[str]) -> tuple[str, ...]:
        """Hooks at the choice of experts and at their weights."""
        names = (f"blocks.{layer}.mlp.experts.{name}" for name in ("hook_index", "hook_weights"))
        return tuple(name for name in names if name in hooks)

    def activation(self, layer: int, hooks: Collection[str]) -> ActivationSite:
        """That inside the experts or, in a layer with a plain MLP, that of the MLP."""
        mlp = f"blocks.{layer}.mlp"
        # "dense_" because "gate" is the router here.
        part = f"{mlp}.experts." if self.routing(layer, hooks) else f"{mlp}.dense_"
        return ActivationSite(f"{part}out.hook_in", f"{part}in.hook_out", f"{part}gate.hook_out")
