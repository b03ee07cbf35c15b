"""The token readout: one token of a language model's vocabulary stands for a label.

It is the word's first one by which all labels differ: `` negatif``, `` netral``, `` positif`` are
two tokens each in many vocabularies, and their first ones tell them apart.

The score of a label is the logit of its token at the decision position. In causal models that is
the last token of the prompt; in masked language models it is the mask, which a few tokens such as
``[SEP]`` follow. It is the same column in every row of a left-padded batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.errors import InputError, check_choice
from circuitlens.models.batch import Batch, Frame, Readout, Views, Words, at_least_float32
from circuitlens.models.hooks import Hook
from circuitlens.models.readouts.columns import last_columns
from circuitlens.models.readouts.sequence import SequenceReadout
from circuitlens.models.readouts.vocabulary import VocabularyReadout, ends_of, rows_of_head
from circuitlens.models.readouts.words import first_difference, refuse_beginnings, tokens_of_words
from circuitlens.models.tokens import PromptText, begin

__all__ = ["TokenReadout"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenReadout(VocabularyReadout):
    """Logits of one token per label at the decision position.

    Attributes:
        tokens: the token of every label.
        shared: tokens with which the words of all labels begin; they are in the prompt.
        masked: the model is a masked language model, which answers at its mask.
    """

    tokens: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    masked: bool = False

    name = "token"
    vocabulary = True

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.tokens)

    @property
    def is_masked(self) -> bool:
        """Whether the model answers at its mask."""
        return self.masked

    # -- prompts -------------------------------------------------------------------------------

    def for_labels(
        self, prompt: PromptText, words: Mapping[str, Words], kind: str = "auto"
    ) -> Readout:
        """Find the token that stands for every label.

        It is the first one by which the words of all labels differ as they follow the prompt; a
        beginning that all share moves into the prompt. Where there is none, or a label has several
        words, whole words are scored (:class:`SequenceReadout`).

        Raises:
            InputError: if two labels have the same word, a word is unknown or changes the tokens
                of the prompt; with ``kind="token"`` if first tokens do not tell the labels apart;
                for classifier readouts, which a language model does not have.
        """
        if kind == "classifier":
            raise InputError(
                "readout='classifier' reads a classification head, and this is a language model: "
                "leave readout out, or give it a head, cl.load(…, labels=task)."
            )
        check_choice("readout", kind, ("auto", "token", "sequence", "sequence-mean"))
        tokenizer = prompt.tokenizer
        found = tokens_of_words(prompt, words)
        single = [tokens[0] for tokens in found.values() if len(tokens) == 1]
        place = first_difference(single) if len(single) == len(found) else None
        if kind in ("auto", "token") and place is not None:
            shared = single[0][:place]
            tokens = tuple(word[place] for word in single)
            _report(tokenizer, tuple(found), tuple(single), place)
            return replace(self, tokens=tokens, shared=shared)
        if kind == "token":
            label, alternatives = next(iter(found.items()))
            pieces = tokenizer.convert_ids_to_tokens(list(alternatives[0]))
            raise InputError(
                "readout='token' needs one word for every label, and a token by which all differ: "
                f"the label {label!r} has {words[label]!r}, which is tokenised as {pieces}. Choose "
                "other words (labels=…), or readout='sequence', which scores whole words."
            )
        mean = kind == "sequence-mean"
        if not mean:
            refuse_beginnings(found, words)
        mask = _mask(tokenizer) if self.masked else None
        return SequenceReadout(words=tuple(found.values()), mask=mask, mean=mean)

    def for_choices(
        self, tokenizer: PreTrainedTokenizerBase, n_choices: int, mean: bool = False
    ) -> Readout:
        """Return the readout of answers that every example brings itself."""
        mask = _mask(tokenizer) if self.masked else None
        return SequenceReadout(n_choices=n_choices, mask=mask, mean=mean)

    def frame(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Frame:
        """``<s>`` before a prompt; of masked models ``[CLS]``, and ``[MASK]`` and ``[SEP]`` behind.

        Raises:
            InputError: if a masked language model has no mask token, or ``<s>`` is asked for and
                there is none.
        """
        if not self.masked:
            return Frame(begin(tokenizer, bos), self.shared, ())
        before, behind = ends_of(tokenizer)
        return Frame(before, (*self.shared, _mask(tokenizer)), behind)

    def where(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """The decision position."""
        found = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        found[:, -1 - batch.n_suffix] = True
        return found

    # -- scores --------------------------------------------------------------------------------

    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Logits of the vocabulary at the decision position, from the hooked view."""
        with last_columns(model, model.bridge.unembed, 1, batch.n_suffix) as arguments:
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
        head = model.hf.get_output_embeddings()
        with last_columns(model, head, 1, batch.n_suffix) as arguments:
            return cast(Tensor, model.run_hf(batch, module, **arguments).logits)[:, 0]

    def hf_label_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """Logits of the label tokens, from the Hugging Face view."""
        return self.of_labels(self.hf_logits(model, batch, module))

    def of_labels(self, logits: Float[Tensor, "*batch d_vocab"]) -> Float[Tensor, "*batch label"]:
        """Pick the logits of the label tokens, in at least float32."""
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
        return rows_of_head(hf, self.tokens)

    # -- the head ------------------------------------------------------------------------------

    def uncapped(self, model: Views) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Logits before the soft-cap that Gemma 2 puts on them."""
        if not getattr(model.hf.config.get_text_config(), "final_logit_softcapping", None):
            return None
        # The unembedding sees nothing but the decision position.
        return "unembed.hook_out", lambda logits: at_least_float32(logits[:, -1])


@lru_cache(maxsize=256)
def _report(
    tokenizer: PreTrainedTokenizerBase,
    labels: tuple[str, ...],
    words: tuple[tuple[int, ...], ...],
    place: int,
) -> None:
    # Cached, so that a task that every stage encodes again is reported once.
    if all(len(word) == 1 for word in words):
        return
    names = [
        f"{label}: {tokenizer.decode([word[place]])!r} of {tokenizer.decode(list(word))!r}"
        for label, word in zip(labels, words, strict=True)
    ]
    logger.info("First tokens that differ stand for the labels (%s).", ", ".join(names))


def _mask(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.mask_token_id is None:
        raise InputError(
            "The tokenizer of this masked language model has no mask token, in whose place the "
            "answer belongs: set tokenizer.mask_token."
        )
    return int(tokenizer.mask_token_id)
