"""Finding the language model inside a larger one."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, Qwen2ForCausalLM
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from circuitlens.errors import UnsupportedModelError

__all__ = ["check_alike", "close", "is_composite", "language_model_of", "parts", "places"]

# How far logits of the two may differ, as a share of the largest.
_TOLERANCE = {torch.bfloat16: 0.1, torch.float16: 0.02}


def close(a: Tensor, b: Tensor) -> bool:
    """Whether logits are the same up to rounding."""
    limit = _TOLERANCE.get(b.dtype, 1e-4)
    return bool((a.float() - b.float()).abs().max() <= limit * b.float().abs().max())


def is_composite(config: PretrainedConfig) -> bool:
    """Whether models of this configuration have a language model inside."""
    known = config.model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return known and config.get_text_config(decoder=True) is not config


def parts(whole: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """Causal language models that are a part as they are, head included."""
    # By name, as looking up the classes would import every one of them.
    kinds = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return [
        (path, module)
        for path, module in whole.named_modules()
        if module is not whole
        and isinstance(module, PreTrainedModel)
        and type(module).__name__ in kinds
    ]


def places(whole: PreTrainedModel) -> tuple[str, str]:
    """Paths of the language model's body and of its head."""
    body, head = whole.get_decoder(), whole.get_output_embeddings()
    names = {id(module): path for path, module in whole.named_modules()}
    return names[id(body)], names[id(head)]


def language_model_of(whole: PreTrainedModel) -> PreTrainedModel | None:
    """The causal language model inside ``whole``, on its own modules; ``None`` if there is none.

    Raises:
        UnsupportedModelError: if there is something like one, which cannot stand alone.
    """
    found_inside = parts(whole)
    if len(found_inside) == 1:
        return found_inside[0][1]
    if found_inside:
        raise UnsupportedModelError(
            f"{type(whole).__name__} has {len(found_inside)} language models inside "
            f"({', '.join(path for path, _ in found_inside)}): load the one that is meant."
        )
    if not is_composite(whole.config):
        return None
    name = type(whole).__name__
    config = whole.config.get_text_config(decoder=True)
    kind: Any = _causal_class(config)
    body, head = whole.get_decoder(), whole.get_output_embeddings()
    if kind is None or getattr(config, "is_encoder_decoder", False) or head is None:
        raise UnsupportedModelError(
            f"The language model inside {name} is of the type {config.model_type}, which Hugging "
            "Face has no causal language model of: circuitlens works on speech and vision models "
            "around one, such as Qwen2-Audio, Voxtral and LLaVA."
        )
    with torch.device("meta"):
        found = kind(config)
    expected = {n for n, _ in found.base_model.named_parameters()}
    if expected != (there := {n for n, _ in body.named_parameters()}):
        odd = sorted(expected ^ there)[0]
        raise UnsupportedModelError(
            f"The language model inside {name} is not laid out as a {kind.__name__} ({odd}), so "
            "it cannot be hooked as one."
        )
    setattr(found, found.base_model_prefix, body)
    found.set_output_embeddings(head)
    return cast(PreTrainedModel, found.eval())


def check_alike(whole: PreTrainedModel, hf: PreTrainedModel) -> None:
    """Make sure that the language model answers text as the composite does.

    Raises:
        UnsupportedModelError: if it does not.
    """
    size = whole.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(size, (1, 6), generator=torch.Generator().manual_seed(0))
    special = {
        value
        for key, value in whole.config.to_dict().items()
        if key.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    # A placeholder without a sound or an image would be an error.
    free = next(n for n in range(size) if n not in special)
    tokens = torch.tensor([[free if n in special else n for n in tokens[0].tolist()]])
    tokens = tokens.to(hf.device)
    mask = torch.ones_like(tokens)
    with torch.no_grad():
        mine, theirs = (
            model(input_ids=tokens, attention_mask=mask).logits for model in (hf, whole)
        )
    if mine.shape != theirs.shape or not close(mine, theirs):
        raise UnsupportedModelError(
            f"The language model inside {type(whole).__name__} gives other logits for text than "
            f"the whole does: it is not a {type(hf).__name__} with something around it."
        )


def _causal_class(config: PretrainedConfig) -> Any:
    """The class of the causal language model with this configuration, if there is one."""
    if config.model_type in ("qwen2_vl_text", "qwen2_5_vl_text"):
        # They differ in positions of several axes, which text has not.
        return Qwen2ForCausalLM
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
