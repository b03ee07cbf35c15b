"""What readouts of a language model's head share: where the head is, and what frames a prompt."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.models.batch import Readout, Views
from circuitlens.models.families import ActivationSite

__all__ = ["VocabularyReadout", "ends_of", "rows_of_head"]


class VocabularyReadout(Readout):
    """A readout of a language model's head, causal or masked."""

    @property
    @abstractmethod
    def is_masked(self) -> bool:
        """Whether the model is a masked language model, which answers at its mask."""

    def input_hook(self) -> str:
        """The input of the unembedding."""
        return "unembed.hook_in"

    def activations(self, model: Views) -> tuple[ActivationSite, ...]:
        """Those of a masked language model's head."""
        return model.family.lm_head_activations

    def auto_class(self) -> Any:
        """A causal language model, or an encoder with its masked-language-model head."""
        return AutoModelForMaskedLM if self.is_masked else AutoModelForCausalLM

    def peft_task_type(self) -> str | None:
        """Causal language models; PEFT has no name for masked ones."""
        return None if self.is_masked else "CAUSAL_LM"

    def predicts_text(self) -> bool:
        """Causal language models do."""
        return not self.is_masked


def rows_of_head(
    hf: PreTrainedModel, tokens: Iterable[int] | None
) -> dict[str, Bool[Tensor, "..."]]:
    """The unembedding's rows of some tokens, or all; where it is tied, the embedding's too."""
    weight = hf.get_output_embeddings().weight
    name = next(n for n, p in hf.named_parameters() if p is weight)
    mask = torch.zeros_like(weight, dtype=torch.bool)
    mask[slice(None) if tokens is None else sorted(tokens)] = True
    return {name: mask}


def ends_of(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """``[CLS]`` and ``[SEP]`` of a masked language model, where the tokenizer has them."""
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    before, behind = (() if end is None else (int(end),) for end in ends)
    return before, behind
