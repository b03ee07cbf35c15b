"""DistilBERT: half of BERT's layers, without token types, and with other names."""

from __future__ import annotations

from typing import Any

from circuitlens.models.families.bert import BertFamily
from circuitlens.models.families.family import ActivationSite

__all__ = ["DistilBertFamily"]

_NAMES = {
    "embed": "distilbert.embeddings.word_embeddings",
    "pos_embed": "distilbert.embeddings.position_embeddings",
    "embed_ln": "distilbert.embeddings.LayerNorm",
    "blocks": "distilbert.transformer.layer",
    "mlm_head": "vocab_transform",
    "ln_final": "vocab_layer_norm",
    "unembed": "vocab_projector",
}
_IN_BLOCKS = {"ln1": "sa_layer_norm", "ln2": "output_layer_norm", "attn": "attention"}
_IN_ATTENTION = {"q": "q_lin", "k": "k_lin", "v": "v_lin", "o": "out_lin"}
_IN_MLP = {"in": "ffn.lin1", "out": "ffn.lin2"}


class DistilBertFamily(BertFamily):
    """DistilBERT: TransformerLens' BERT, with DistilBERT's names of modules."""

    classifier_activations = (ActivationSite("unembed.hook_in", "head_dense.hook_out"),)
    # Handed on to the body, though the heads' signatures do not name them.
    passes_positions = True

    @property
    def architecture(self) -> str:
        """TransformerLens does not know DistilBERT."""
        return "BertForMaskedLM"

    def adapt(self, adapter: Any) -> None:
        """Rename what is BERT's, and leave out what DistilBERT has not."""
        components = adapter.component_mapping
        del components["token_type_embed"]
        for name, place in _NAMES.items():
            components[name].name = place
        block = components["blocks"].submodules
        for parts, names in (
            (block, _IN_BLOCKS),
            (block["attn"].submodules, _IN_ATTENTION),
            (block["mlp"].submodules, _IN_MLP),
        ):
            for name, place in names.items():
                parts[name].name = place
        super().adapt(adapter)

    def adapt_head(self, components: dict[str, Any]) -> None:
        """Hook the first map of the head as well."""
        from transformer_lens.model_bridge.generalized_components import LinearBridge

        super().adapt_head(components)
        components["head_dense"] = LinearBridge(name="pre_classifier")
