"""The common case, from which a family departs where it must."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

__all__ = ["ActivationSite", "Family"]


@dataclass(frozen=True)
class ActivationSite:
    """Names of the hooks around one activation function.

    Attributes:
        post: its output, times the linear part if the MLP is gated.
        up: its input, or the linear part if the MLP is gated.
        gate: its input if the MLP is gated.
    """

    post: str
    up: str
    gate: str | None = None


class Family:
    """Where things are in the hooked view of a causal model with one MLP per layer.

    Attributes:
        causal: whether tokens see only what comes before them; else it is a masked language
            model, which answers at its mask token.
        passes_positions: position ids reach the body, though the head does not name them.
    """

    causal = True
    passes_positions = False
    # Where the classification head looks, what its last map is, and what hooks are round its
    # activation, if it has one.
    pooled: Literal["first", "last", "mean"] = "last"
    classifier = "score"
    classifier_activations: tuple[ActivationSite, ...] = ()

    def __init__(self, hf: PreTrainedModel) -> None:
        self.hf = hf

    @property
    def architecture(self) -> str:
        """Name under which TransformerLens knows this architecture."""
        # Not what the configuration names: a checkpoint may have been saved with another head.
        if not self.is_classifier:
            return type(self.hf).__name__
        # It knows no classification heads: the body is that of the language model.
        names = (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if self.causal else MODEL_FOR_MASKED_LM_MAPPING_NAMES
        )
        return str(names[self.hf.config.model_type])

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a classification head."""
        return type(self.hf).__name__.endswith("ForSequenceClassification")

    @property
    def first_position(self) -> int:
        """Position id of the first token."""
        return 0

    @property
    def lm_head_activations(self) -> tuple[ActivationSite, ...]:
        """Activation functions in the language-model head."""
        return ()

    def adapt(self, adapter: Any) -> None:
        """Change how TransformerLens is going to build the hooked view."""
        if self.is_classifier:
            self.adapt_head(adapter.component_mapping)

    def adapt_head(self, components: dict[str, Any]) -> None:
        """Put the last map of the classification head in place of the unembedding."""
        from transformer_lens.model_bridge.generalized_components import UnembeddingBridge

        components["unembed"] = UnembeddingBridge(name=self.classifier)

    def mlp_output(self, layer: int) -> str:
        """Hook at the output of an MLP, before any norm behind it."""
        # Not that of the whole module, which BERT has not, and which in BLOOM adds the residual.
        return f"blocks.{layer}.mlp.out.hook_out"

    def routing(self, layer: int, hooks: Collection[str]) -> tuple[str, ...]:
        """Hooks at what sends tokens to experts: their choice and weights; none without experts."""
        return ()

    def activations(self, n_layers: int, hooks: Collection[str]) -> tuple[ActivationSite, ...]:
        """The activation functions of all layers, in order."""
        return tuple(self.activation(layer, hooks) for layer in range(n_layers))

    def activation(self, layer: int, hooks: Collection[str]) -> ActivationSite:
        """The activation function of a layer's MLP."""
        mlp = f"blocks.{layer}.mlp"
        gate = f"{mlp}.gate.hook_out"
        return ActivationSite(
            f"{mlp}.out.hook_in", f"{mlp}.in.hook_out", gate if gate in hooks else None
        )
