"""The classifier readout: class scores of a model with a classification head.

The model pools its last layer as it does in Hugging Face: encoders at the first token, decoders at
the last one that is not padding, some over all tokens. There is no prompt and no answer word; the
texts are joined as the tokenizer joins them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from circuitlens.errors import InputError
from circuitlens.models.batch import Batch, Frame, Readout, Views, Words, at_least_float32
from circuitlens.models.families import ActivationSite
from circuitlens.models.hooks import Hook
from circuitlens.models.tokens import PromptText, around

__all__ = ["ClassifierReadout", "Pooled", "is_unnamed"]

Pooled = Literal["first", "last", "mean"]


@dataclass(frozen=True)
class ClassifierReadout(Readout):
    """Scores of the classes that stand for the labels.

    Attributes:
        names: names of all classes, in order of the head's outputs.
        pooled: position at which the head looks.
        pad_token: in decoders, the token that the head does not look at.
        classes: class of every label.
        segment: token behind which the second text begins, where the model tells the two apart.
    """

    names: tuple[str, ...] = ()
    pooled: Pooled = "first"
    pad_token: int | None = None
    classes: tuple[int, ...] = ()
    segment: int | None = None

    name = "classifier"
    prompted = False

    @property
    def n_labels(self) -> int:
        """Number of labels."""
        return len(self.classes)

    @property
    def pad_right(self) -> bool:  # type: ignore[override]
        """The first column is that of the first token."""
        return self.pooled != "last"

    # -- prompts -------------------------------------------------------------------------------

    def for_labels(
        self, prompt: PromptText, words: Mapping[str, Words], kind: str = "auto"
    ) -> ClassifierReadout:
        """Find the class of every label by its name.

        Raises:
            InputError: for another kind of readout; if the classes have no names, or a label is
                none of them.
        """
        if kind not in ("auto", "classifier"):
            raise InputError(
                f"readout={kind!r} reads words, and this model has a classification head instead: "
                "leave readout out, or load a language model."
            )
        if is_unnamed(self.names):
            raise InputError(
                f"The classes of this model are called {', '.join(self.names)}, which says nothing "
                "of labels: name them in their order, cl.load(…, labels=[…]) (--classifier takes "
                f"the labels of the task in their order: {', '.join(words)})."
            )
        known = {_plain(name): number for number, name in enumerate(self.names)}
        found: dict[str, int] = {}
        for label, given in words.items():
            tries = [label, *((given,) if isinstance(given, str) else given)]
            number = next((known[n] for n in map(_plain, tries) if n in known), None)
            if number is None:
                raise InputError(
                    f"The label {label!r} of the task is not one of the classes of this model "
                    f"({', '.join(self.names)}): rename one of them, cl.load(…, labels=[…]), or "
                    "choose a model of this task."
                )
            if number in found.values():
                other = next(name for name, n in found.items() if n == number)
                raise InputError(
                    f"The labels {other!r} and {label!r} are both the class "
                    f"{self.names[number]!r} of this model: rename one of them."
                )
            found[label] = number
        pair = prompt.tokenizer("x", "x")
        apart = 1 in pair.get("token_type_ids", ())
        between = around(prompt.tokenizer).between
        segment = between[0] if apart and between else None
        return replace(self, classes=tuple(found.values()), segment=segment)

    def for_choices(
        self, tokenizer: PreTrainedTokenizerBase, n_choices: int, mean: bool = False
    ) -> Readout:
        """There are none.

        Raises:
            InputError: always.
        """
        raise InputError(
            "Answers that every example brings itself are scored by a language model, and this "
            "model has a classification head: load the language model."
        )

    def frame(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Frame:
        """What the tokenizer itself puts around a text, and between two."""
        found = around(tokenizer)
        return Frame(found.before, (), found.behind, found.between)

    def where(self, batch: Batch) -> Bool[Tensor, "row pos"]:
        """Where the head looks."""
        tokens = batch.attention_mask.bool()
        if self.pooled == "mean":
            return tokens
        found = torch.zeros_like(tokens)
        if self.pooled == "first":
            found[:, 0] = True
            return found
        # As in Hugging Face: the last token that is not the one for padding.
        place = torch.arange(tokens.shape[1], device=tokens.device)
        other = batch.input_ids != self.pad_token
        last = (place * other).argmax(-1)
        found[torch.arange(len(found), device=last.device), last] = True
        return found

    # -- scores --------------------------------------------------------------------------------

    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch d_class"]:
        """Scores of all classes, from the hooked view."""
        return cast(Tensor, model.run(batch, hooks, **self._segments(model, batch)))

    def label_logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """Scores of the labels, from the hooked view."""
        return self.of_labels(self.logits(model, batch, hooks))

    def hf_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch d_class"]:
        """Scores of all classes, from the Hugging Face view."""
        return cast(Tensor, model.run_hf(batch, module, **self._segments(model, batch)).logits)

    def hf_label_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """Scores of the labels, from the Hugging Face view."""
        return self.of_labels(self.hf_logits(model, batch, module))

    def of_labels(self, logits: Float[Tensor, "*batch d_class"]) -> Float[Tensor, "*batch label"]:
        """Pick the classes that stand for the labels, in at least float32."""
        return at_least_float32(logits[..., self._on(logits.device)])

    def output_names(self, labels: Sequence[str]) -> Sequence[str] | None:
        """The classes."""
        return self.names

    def _on(self, device: torch.device) -> Int[Tensor, " label"]:
        return torch.tensor(self.classes, dtype=torch.long, device=device)

    def _segments(self, model: Views, batch: Batch) -> dict[str, Tensor]:
        """Which tokens belong to the second text of a pair, for models that want to know."""
        kinds = getattr(model.hf.config, "type_vocab_size", 0)
        if self.segment is None or kinds < 2 or "token_type_ids" not in model.accepted:
            return {}
        ends = batch.input_ids == self.segment
        return {"token_type_ids": ((ends.cumsum(-1) - ends.long()) > 0).long()}

    # -- training ------------------------------------------------------------------------------

    def losses(self, model: Views, batch: Batch, module: nn.Module) -> Float[Tensor, " batch"]:
        """Cross-entropy over all classes."""
        logits = self.hf_logits(model, batch, module).float()
        targets = self._on(logits.device)[batch.gold]
        return F.cross_entropy(logits, targets, reduction="none")

    def head_masks(self, hf: PreTrainedModel) -> dict[str, Bool[Tensor, "..."]]:
        """Everything on top of the base model."""
        base = f"{hf.base_model_prefix}."
        return {
            name: torch.ones_like(parameter, dtype=torch.bool)
            for name, parameter in hf.named_parameters()
            if not name.startswith(base)
        }

    # -- the head ------------------------------------------------------------------------------

    def input_hook(self) -> str:
        """The input of the head's last map."""
        return "unembed.hook_in"

    def activations(self, model: Views) -> tuple[ActivationSite, ...]:
        """Those of the head."""
        return model.family.classifier_activations

    def uncapped(self, model: Views) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """None: class scores have no cap."""
        return None

    def auto_class(self) -> Any:
        """A model with a classification head."""
        return AutoModelForSequenceClassification

    def peft_task_type(self) -> str | None:
        """Sequence classification."""
        return "SEQ_CLS"


def is_unnamed(names: Sequence[str]) -> bool:
    """Whether these are the names that Hugging Face gives classes of which it knows nothing."""
    return all(re.fullmatch(r"LABEL_\d+", name) for name in names)


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").split()).casefold()
