"""The token readout: a label is one token of a language model's vocabulary.

The score of a label is the logit of its token at the decision position. In causal models that is
the last token of the prompt; in masked language models it is the mask, which a few tokens such as
``[SEP]`` follow. It is the same column in every row of a left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.errors import InputError
from circuitlens.models.batch import Batch, Frame, Readout, Views, at_least_float32
from circuitlens.models.families import ActivationSite
from circuitlens.models.hooks import Hook

__all__ = ["TokenReadout"]


@dataclass(frozen=True)
class TokenReadout(Readout):
    """Logits of one token per label at the decision position.

    Attributes:
        tokens: the token of every label.
        masked: the model is a masked language model, which answers in the place of its mask.
    """

    tokens: tuple[int, ...] = ()
    masked: bool = False

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.tokens)

    # -- prompts -------------------------------------------------------------------------------

    def for_labels(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, words: Mapping[str, str]
    ) -> TokenReadout:
        """Find the token of every label word as it follows the prompt.

        Words are tried behind the prompt and not alone, because tokenizers of the SentencePiece
        kind split the two cases differently.

        Raises:
            InputError: if a word is not exactly one token there, or two labels share one.
        """
        before = _ids(tokenizer, prompt)
        found: dict[str, int] = {}
        for label, word in words.items():
            after = _ids(tokenizer, prompt + word)
            if len(after) != len(before) + 1 or after[:-1] != before:
                pieces = tokenizer.convert_ids_to_tokens(_ids(tokenizer, word))
                raise InputError(
                    f"The word {word!r} of the label {label!r} must be one token behind the prompt "
                    f"{prompt!r}, but is tokenised as {pieces}: choose another word (labels=…)."
                )
            if after[-1] in found.values():
                other = next(name for name, token in found.items() if token == after[-1])
                raise InputError(
                    f"The labels {other!r} and {label!r} have the same token for {word!r}: "
                    "choose different words (labels=…)."
                )
            found[label] = after[-1]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in found.values():
            label = next(name for name, token in found.items() if token == tokenizer.unk_token_id)
            raise InputError(
                f"The word {words[label]!r} of the label {label!r} is unknown to the tokenizer: "
                "choose another word (labels=…)."
            )
        return replace(self, tokens=tuple(found.values()))

    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """``<s>`` before a prompt; of masked models ``[CLS]``, and ``[MASK]`` and ``[SEP]`` behind.

        Raises:
            InputError: if a masked language model has no mask token.
        """
        if not self.masked:
            return Frame(_some(tokenizer.bos_token_id), (), ())
        if tokenizer.mask_token_id is None:
            raise InputError(
                "The tokenizer of this masked language model has no mask token, in whose place the "
                "answer belongs: set tokenizer.mask_token."
            )
        return Frame(
            _some(tokenizer.cls_token_id),
            _some(tokenizer.mask_token_id),
            _some(tokenizer.sep_token_id),
        )

    def where(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """The decision position."""
        found = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        found[:, _decision(batch)] = True
        return found

    # -- scores --------------------------------------------------------------------------------

    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the vocabulary at the decision position, from the hooked view."""
        with _only_decision(model, model.bridge.unembed, batch) as arguments:
            return cast(Tensor, model.run(batch, hooks, **arguments))[:, 0]

    def label_logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """Logits of the label tokens; no other token of the vocabulary is computed."""
        unembed = model.bridge.unembed
        head = unembed.original_component
        if not isinstance(head, nn.Linear):
            return self.of_labels(self.logits(model, batch, hooks))
        tokens = self._on(head.weight.device)
        weight = head.weight[tokens]
        bias = None if head.bias is None else head.bias[tokens]

        def restricted(x: Tensor, *_: Any, **__: Any) -> Tensor:
            return cast(Tensor, unembed.hook_out(F.linear(unembed.hook_in(x), weight, bias)))

        unembed.__dict__["forward"] = restricted
        try:
            return at_least_float32(self.logits(model, batch, hooks))
        finally:
            del unembed.__dict__["forward"]

    def hf_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the vocabulary at the decision position, from the Hugging Face view."""
        with _only_decision(model, model.hf.get_output_embeddings(), batch) as arguments:
            return cast(Tensor, model.run_hf(batch, module, **arguments).logits)[:, 0]

    def hf_label_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """Logits of the label tokens, from the Hugging Face view."""
        return self.of_labels(self.hf_logits(model, batch, module))

    def of_labels(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch label"]:
        """Pick the logits of the label tokens, in float32 at least."""
        return at_least_float32(logits[..., self._on(logits.device)])

    def _on(self, device: torch.device) -> Int[Tensor, " label"]:
        return torch.tensor(self.tokens, dtype=torch.long, device=device)

    # -- training ------------------------------------------------------------------------------

    def losses(self, model: Views, batch: Batch, module: nn.Module) -> Float[Tensor, " batch"]:
        """Cross-entropy over the whole vocabulary at the decision position."""
        logits = self.hf_logits(model, batch, module).float()
        targets = self._on(logits.device)[batch.gold]
        return F.cross_entropy(logits, targets, reduction="none")

    def head_masks(self, hf: PreTrainedModel) -> dict[str, Bool[Tensor, "..."]]:
        """The unembedding's rows of the label tokens; where it is tied, the embedding's too."""
        weight = hf.get_output_embeddings().weight
        name = next(n for n, p in hf.named_parameters() if p is weight)
        mask = torch.zeros_like(weight, dtype=torch.bool)
        mask[list(self.tokens)] = True
        return {name: mask}

    # -- the head ------------------------------------------------------------------------------

    def input_hook(self) -> str:
        """The input of the unembedding."""
        return "unembed.hook_in"

    def activations(self, model: Views) -> tuple[ActivationSite, ...]:
        """Those of a masked language model's head."""
        return model.family.lm_head_activations

    def uncapped(self, model: Views) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Logits before the soft-cap that Gemma 2 puts on them."""
        if not getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None):
            return None
        # The unembedding sees nothing but the decision position.
        return "unembed.hook_out", lambda logits: at_least_float32(logits[:, -1])

    def auto_class(self) -> Any:
        """A causal language model, or an encoder with its masked-language-model head."""
        return AutoModelForMaskedLM if self.masked else AutoModelForCausalLM

    def peft_task_type(self) -> str | None:
        """Causal language models; PEFT has no name for masked ones."""
        return None if self.masked else "CAUSAL_LM"


def _decision(batch: Batch) -> int:
    """Column of the decision position, counted from the end: −1 is the last token."""
    return -1 - batch.n_suffix


@contextmanager
def _only_decision(model: Views, head: nn.Module, batch: Batch) -> Iterator[dict[str, Any]]:
    """Let the head see nothing but the decision position; yield arguments that ask for it.

    A row of the size of the vocabulary for every token would be pure memory.
    """
    if "logits_to_keep" in model.accepted:
        yield {"logits_to_keep": -_decision(batch)}
        return

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0][:, _decision(batch)][:, None]

    handle = head.register_forward_pre_hook(select)
    try:
        yield {}
    finally:
        handle.remove()


def _some(token: int | None) -> tuple[int, ...]:
    return () if token is None else (int(token),)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
