"""Which family a model belongs to."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedModel

from circuitlens.models.families.bert import BertFamily, RobertaFamily
from circuitlens.models.families.distilbert import DistilBertFamily
from circuitlens.models.families.electra import ElectraFamily
from circuitlens.models.families.falcon import FalconFamily
from circuitlens.models.families.family import Family
from circuitlens.models.families.modernbert import ModernBertFamily
from circuitlens.models.families.moe import MoEFamily

__all__ = ["family_of", "is_encoder", "is_tested", "tested_types"]

# By model type, for all that the tests cover; others must pass the self-check.
_FAMILIES: dict[str, type[Family]] = {
    "bert": BertFamily,
    "bloom": Family,
    "distilbert": DistilBertFamily,
    "electra": ElectraFamily,
    "falcon": FalconFamily,
    "gemma2": Family,
    "gemma3_text": Family,
    "gpt2": Family,
    "gpt_neox": Family,
    "llama": Family,
    "mistral": Family,
    "mixtral": MoEFamily,
    "modernbert": ModernBertFamily,
    "olmo2": Family,
    "opt": Family,
    "phi3": Family,
    "qwen2": Family,
    "qwen3": Family,
    "qwen3_moe": MoEFamily,
    "roberta": RobertaFamily,
    "xlm-roberta": RobertaFamily,
}


def family_of(hf: PreTrainedModel) -> Family:
    """Return the family of a model; the common one if its type is not one of the tested ones."""
    return _FAMILIES.get(hf.config.get_text_config().model_type, Family)(hf)


def is_encoder(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration is of a family without causal mask."""
    family = _FAMILIES.get(config.model_type, Family)
    return not (family.causal or getattr(config, "is_decoder", False))


def is_tested(config: PretrainedConfig) -> bool:
    """Whether the tests cover models of this type."""
    return config.model_type in _FAMILIES


def tested_types() -> str:
    """The model types that the tests cover, for messages."""
    return ", ".join(_FAMILIES)
