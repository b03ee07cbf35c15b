"""Configurations of tested types that TransformerLens takes for others.

The self-check finds them as well, but not in 16 bits, where they pass for rounding.
"""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from circuitlens.errors import UnsupportedModelError

__all__ = ["refuse_misread", "refuse_type"]

_POSITIONS = (
    "its attention scores are sums of terms of content and of relative positions, made of the same "
    "projections, which TransformerLens has no hooks for"
)
# What TransformerLens, or the engine (of causality), assumes whatever the configuration says.
_ASSUMED: dict[str, dict[str, object]] = {
    "gpt2": {"scale_attn_weights": True, "add_cross_attention": False},
    "gemma3_text": {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
}


# Types that cannot be hooked head by head, and why.
_REFUSED = {
    "albert": (
        "all its layers share one set of weights, so that no head can be trained, and no circuit "
        "kept, in one layer only"
    ),
    "deberta": _POSITIONS,
    "deberta-v2": _POSITIONS,
}


def refuse_type(config: PretrainedConfig) -> None:
    """Reject a type of model of which it is known that its heads cannot be hooked.

    Raises:
        UnsupportedModelError: naming it and the reason.
    """
    if reason := _REFUSED.get(config.model_type):
        raise UnsupportedModelError(
            f"Models of the type {config.model_type} are not supported: {reason}. Use a model of "
            "another type, such as xlm-roberta or modernbert."
        )


def refuse_misread(hf: PreTrainedModel) -> None:
    """Reject a model with an option that the hooked view would not have.

    Raises:
        UnsupportedModelError: naming the option.
    """
    config = hf.config.get_text_config()
    name = type(hf).__name__
    for option, assumed in _ASSUMED.get(config.model_type, {}).items():
        found = getattr(config, option, assumed)
        if found != assumed:
            raise UnsupportedModelError(
                f"The {name} has {option}={found}, but the hooked view would be that of a model "
                f"with {option}={assumed}: use a checkpoint with that."
            )
    if config.model_type == "opt":
        has_norm = config.do_layer_norm_before and not config._remove_final_layer_norm
        # TransformerLens looks for the norm behind the layers unless embeddings are projected, as
        # in the one released model without (OPT-350m).
        if has_norm != (config.word_embed_proj_dim == config.hidden_size):
            raise UnsupportedModelError(
                f"The {name} has {'a' if has_norm else 'no'} norm behind its layers, where "
                "TransformerLens expects the opposite (do_layer_norm_before="
                f"{config.do_layer_norm_before}, word_embed_proj_dim={config.word_embed_proj_dim}, "
                f"_remove_final_layer_norm={config._remove_final_layer_norm}): use a checkpoint "
                "with the options of a released OPT model."
            )
