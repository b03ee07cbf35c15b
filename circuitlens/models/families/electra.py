"""ELECTRA: BERT under other names, and with other heads."""

from __future__ import annotations

from typing import Any

from circuitlens.models.families.bert import BertFamily
from circuitlens.models.families.family import ActivationSite

__all__ = ["ElectraFamily"]

_HEADS = {
    "mlm_head": "generator_predictions.dense",
    "ln_final": "generator_predictions.LayerNorm",
    "unembed": "generator_lm_head",
}


class ElectraFamily(BertFamily):
    """ELECTRA: TransformerLens' BERT, with ELECTRA's names of modules."""

    classifier = "classifier.out_proj"
    classifier_activations = (ActivationSite("unembed.hook_in", "head_dense.hook_out"),)

    @property
    def architecture(self) -> str:
        """TransformerLens does not know ELECTRA."""
        return "BertForMaskedLM"

    def adapt(self, adapter: Any) -> None:
        """Rename what is BERT's."""
        for name, component in adapter.component_mapping.items():
            if name in _HEADS:
                component.name = _HEADS[name]
            elif component.name:
                component.name = component.name.replace("bert.", "electra.", 1)
        super().adapt(adapter)

    def adapt_head(self, components: dict[str, Any]) -> None:
        """Hook the first map of the head as well."""
        from transformer_lens.model_bridge.generalized_components import LinearBridge

        super().adapt_head(components)
        components["head_dense"] = LinearBridge(name="classifier.dense")
