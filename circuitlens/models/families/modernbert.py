"""ModernBERT: rotary positions, local and global layers, fused projections and gated MLPs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from circuitlens.models.families.bert import BertFamily
from circuitlens.models.families.family import ActivationSite, Family

__all__ = ["ModernBertFamily"]


class ModernBertFamily(BertFamily):
    """ModernBERT, whose encoder TransformerLens does not know."""

    @property
    def pooled(self) -> str:  # type: ignore[override]
        """At the first token or over all, as the configuration says."""
        return "first" if self.hf.config.classifier_pooling == "cls" else "mean"

    @property
    def architecture(self) -> str:
        """The decoder of that name has an adapter, whose components are all replaced."""
        return "ModernBertDecoderForCausalLM"

    @property
    def lm_head_activations(self) -> tuple[ActivationSite, ...]:
        """The one in the head, before its norm."""
        return (ActivationSite("head_norm.hook_in", "head_dense.hook_out"),)

    @property
    def classifier_activations(self) -> tuple[ActivationSite, ...]:  # type: ignore[override]
        """The same."""
        return self.lm_head_activations

    def activation(self, layer: int, hooks: Any) -> ActivationSite:
        """The MLP's: act(gate) times the other half."""
        return Family.activation(self, layer, hooks)

    def adapt(self, adapter: Any) -> None:
        """Say what the encoder is made of."""
        from transformer_lens.model_bridge import generalized_components as parts

        config = adapter.cfg
        config.attention_dir = "bidirectional"
        config.gated_mlp = True

        def norm(name: str) -> Any:
            return parts.NormalizationBridge(
                name=name, config=config, use_native_layernorm_autograd=True
            )

        linear = parts.LinearBridge
        attention = parts.JointQKVPositionEmbeddingsAttentionBridge(
            name="attn",
            config=config,
            split_qkv_matrix=lambda module: _split(module.Wqkv, 3),
            submodules={"qkv": linear(name="Wqkv"), "o": linear(name="Wo")},
        )
        # Without padding there is no mask that says so.
        attention.is_causal = False
        mlp = parts.JointGateUpMLPBridge(
            name="mlp",
            config=config,
            split_gate_up_matrix=lambda module: _split(module.Wi, 2),
            submodules={"out": linear(name="Wo")},
        )
        block = parts.BlockBridge(
            name="model.layers",
            config=config,
            submodules={
                # In the first layer no norm at all.
                "ln1": norm("attn_norm"),
                "attn": attention,
                "ln2": norm("mlp_norm"),
                "mlp": mlp,
            },
        )
        last = self.classifier if self.is_classifier else "decoder"
        adapter.component_mapping = {
            "embed": parts.EmbeddingBridge(name="model.embeddings.tok_embeddings"),
            "embed_ln": norm("model.embeddings.norm"),
            "rotary_emb": parts.RotaryEmbeddingBridge(name="model.rotary_emb"),
            "blocks": block,
            "ln_final": norm("model.final_norm"),
            "head_dense": linear(name="head.dense"),
            "head_norm": norm("head.norm"),
            "unembed": parts.UnembeddingBridge(name=last),
        }


def _split(fused: nn.Module, n: int) -> tuple[nn.Linear, ...]:
    """Linear maps made of equal parts of a fused one, which share its memory."""

    def part(weight: Tensor, bias: Tensor | None) -> nn.Linear:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight)
        if bias is not None:
            made.bias = nn.Parameter(bias)
        return made

    weights = fused.weight.tensor_split(n)  # type: ignore[operator]
    bias = fused.bias
    biases = [None] * n if bias is None else bias.tensor_split(n)  # type: ignore[operator]
    return tuple(part(w, b) for w, b in zip(weights, biases, strict=True))
