"""The common case, from which a family departs where it must."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from transformers import PreTrainedModel

__all__ = ["ActivationSite", "Family", "family_of"]


@dataclass(frozen=True)
class ActivationSite:
    """Names of the hooks round one activation function.

    Attributes:
        post: its output, times the linear part if the MLP is gated.
        up: its input, or the linear part if the MLP is gated.
        gate: its input if the MLP is gated.
    """

    post: str
    up: str
    gate: str | None = None


class Family:
    """Where things are in the hooked view of a causal model with one MLP a layer."""

    causal = True

    def mlp_output(self, layer: int) -> str:
        """Hook at the output of an MLP, before any norm behind it."""
        return f"blocks.{layer}.mlp.hook_out"

    def routing(self, layer: int, hooks: Collection[str]) -> tuple[str, ...]:
        """Hooks at what sends tokens to experts: their choice and weights; none without experts."""
        return ()

    def activations(self, n_layers: int, hooks: Collection[str]) -> tuple[ActivationSite, ...]:
        """All activation functions on the residual stream's way to the logits, in order."""
        sites = []
        for mlp in (f"blocks.{layer}.mlp" for layer in range(n_layers)):
            gate = f"{mlp}.gate.hook_out"
            sites.append(
                ActivationSite(
                    f"{mlp}.out.hook_in", f"{mlp}.in.hook_out", gate if gate in hooks else None
                )
            )
        return tuple(sites)


def family_of(hf: PreTrainedModel) -> Family:
    """Return the family of a model."""
    return Family()
