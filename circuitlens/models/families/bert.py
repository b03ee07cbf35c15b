"""BERT and RoBERTa, with a masked-language-model head or a classification head."""

from __future__ import annotations

from typing import Any

from circuitlens.models.families.family import ActivationSite, Family

__all__ = ["BertFamily", "RobertaFamily"]


class BertFamily(Family):
    """BERT: tokens see each other both ways, and the head has its own activation."""

    causal = False
    pooled = "first"
    classifier = "classifier"
    classifier_activations = (ActivationSite("unembed.hook_in", "pooler.dense.hook_out"),)

    @property
    def lm_head_activations(self) -> tuple[ActivationSite, ...]:
        """The one before the head's norm."""
        return (ActivationSite("ln_final.hook_in", "mlm_head.hook_out"),)

    def adapt_head(self, components: dict[str, Any]) -> None:
        """Leave out the other head's maps too."""
        super().adapt_head(components)
        for name in ("mlm_head", "ln_final"):
            components.pop(name, None)


class RobertaFamily(BertFamily):
    """RoBERTa and XLM-R: BERT with positions counted from behind that of the padding."""

    classifier = "classifier.out_proj"
    classifier_activations = (ActivationSite("unembed.hook_in", "head_dense.hook_out"),)

    @property
    def architecture(self) -> str:
        """XLM-R is RoBERTa under another name, which TransformerLens does not know."""
        return super().architecture.removeprefix("XLM")

    @property
    def first_position(self) -> int:
        """Position id of the first token."""
        return int(self.hf.config.pad_token_id) + 1

    def adapt_head(self, components: dict[str, Any]) -> None:
        """Hook the first map of the head as well."""
        from transformer_lens.model_bridge.generalized_components import LinearBridge

        super().adapt_head(components)
        components["head_dense"] = LinearBridge(name="classifier.dense")
