"""Token batches, where their answers are read, and the task margin of the answers.

:class:`Readout` is what the rest of the package knows of answers; the kinds of readout are in
:mod:`circuitlens.models.readouts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.errors import check_choice
from circuitlens.models.families import ActivationSite, Family
from circuitlens.models.hooks import Hook

__all__ = [
    "Batch",
    "Frame",
    "Positions",
    "Readout",
    "Views",
    "at_least_float32",
    "margin",
    "task_margin",
]

Positions = Literal["all", "decision", "all+first"]


class Views(ABC):
    """What a readout asks of a :class:`circuitlens.HookedModel`."""

    # A PreTrainedModel; mypy misreads the wrapped methods of that class.
    hf: Any

    @property
    @abstractmethod
    def bridge(self) -> Any:
        """The hooked view."""

    @property
    @abstractmethod
    def family(self) -> Family:
        """What this kind of model needs beyond the hooks that all share."""

    @property
    @abstractmethod
    def accepted(self) -> Collection[str]:
        """Names of the arguments that the Hugging Face model takes."""

    @abstractmethod
    def run(self, batch: Batch, hooks: Mapping[str, Hook], **arguments: Any) -> Any:
        """Output of the hooked view, with hooks and further arguments."""

    @abstractmethod
    def run_hf(self, batch: Batch, module: nn.Module | None, **arguments: Any) -> Any:
        """Output of the Hugging Face view, or of what a training framework made of it."""


class Frame(NamedTuple):
    """Tokens around a filled prompt template.

    Attributes:
        before: that belong to no text, such as ``<s>``.
        place: where the answer belongs, if it has a place of its own, such as ``[MASK]``.
        behind: that belong to no text, such as ``[SEP]``.
    """

    before: tuple[int, ...]
    place: tuple[int, ...]
    behind: tuple[int, ...]


class Readout(ABC):
    """Where the answers of a batch are read, and the scores of the labels there.

    The only home of this knowledge: what token stands for a label, which column is read, what the
    model's head is. A batch carries the readout of its task; :attr:`HookedModel.readout` is the one
    of the model, which knows no labels yet. Readouts are compared by value and have a short repr
    that tells them apart, as checkpoints name them.
    """

    @property
    @abstractmethod
    def n_labels(self) -> int:
        """Number of labels; 0 before :meth:`for_labels`."""

    # -- prompts -------------------------------------------------------------------------------

    @abstractmethod
    def for_labels(
        self, tokenizer: PreTrainedTokenizerBase, prompt: str, words: Mapping[str, str]
    ) -> Readout:
        """Return the readout of these labels.

        Args:
            tokenizer: of the model.
            prompt: an example of what stands in front of the answer.
            words: answer word by label; their order numbers the labels.

        Raises:
            InputError: if the labels cannot be told apart by their words.
        """

    @abstractmethod
    def frame(self, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Tokens that the model expects around a prompt.

        Raises:
            InputError: if the tokenizer lacks one of them.
        """

    @abstractmethod
    def where(self, batch: Batch) -> Bool[Tensor, "batch pos"]:
        """Positions at which the answer is read."""

    # -- scores --------------------------------------------------------------------------------

    @abstractmethod
    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch d_out"]:
        """All outputs of the head where the answer is read, from the hooked view."""

    @abstractmethod
    def label_logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """Score of every label from the hooked view, in float32 at least."""

    @abstractmethod
    def hf_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch d_out"]:
        """As :meth:`logits`, from the Hugging Face view."""

    @abstractmethod
    def hf_label_logits(
        self, model: Views, batch: Batch, module: nn.Module | None = None
    ) -> Float[Tensor, "batch label"]:
        """As :meth:`label_logits`, from the Hugging Face view."""

    @abstractmethod
    def of_labels(self, logits: Float[Tensor, "*batch d_out"]) -> Float[Tensor, "*batch label"]:
        """Pick the scores of the labels out of all outputs, in float32 at least."""

    # -- training ------------------------------------------------------------------------------

    @abstractmethod
    def losses(self, model: Views, batch: Batch, module: nn.Module) -> Float[Tensor, " batch"]:
        """Training loss of every example, from the Hugging Face view, in float32."""

    @abstractmethod
    def head_masks(self, hf: PreTrainedModel) -> dict[str, Bool[Tensor, "..."]]:
        """Entries of the head that belong to the labels, by parameter name."""

    # -- the head ------------------------------------------------------------------------------

    @abstractmethod
    def input_hook(self) -> str:
        """Canonical name of the hook at the head's input."""

    @abstractmethod
    def activations(self, model: Views) -> tuple[ActivationSite, ...]:
        """Activation functions inside the head."""

    @abstractmethod
    def uncapped(self, model: Views) -> tuple[str, Callable[[Tensor], Tensor]] | None:
        """Where scores can be read before a cap on them, and how; ``None`` without one."""

    @abstractmethod
    def auto_class(self) -> Any:
        """The class of transformers that loads a model with this head."""

    @abstractmethod
    def peft_task_type(self) -> str | None:
        """PEFT's name for what the model does; ``None`` where it has none."""


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on prompt tokens, 0 on padding.
        gold: index of the right label, for every row.
        readout: says where the answer is read.
        n_prefix: tokens at the start of each prompt that belong to no text (1 for ``<s>``).
        n_suffix: tokens at the end of each prompt that belong to no text (1 for ``[SEP]``).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    gold: Int[Tensor, " batch"]
    readout: Readout
    n_prefix: int = 0
    n_suffix: int = 0

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions counted from the first prompt token, so that padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def mask(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Positions that a source or a mean speaks of.

        ``"all"`` is every prompt token but the first, where the attention sink sits, be it ``<s>``
        or, in models without one, the first token of the text; and but what stands in front of the
        text or behind it. A first token at which the answer is read is in. ``"all+first"`` is these
        and what they leave out in front. ``"decision"`` is where the answer is read.

        Raises:
            InputError: for other positions than these.
        """
        check_choice("positions", positions, get_args(Positions))
        decision = self.readout.where(self)
        if positions == "decision":
            return decision
        chosen = self.attention_mask.bool()
        if positions == "all":
            in_front = self.attention_mask.cumsum(-1) <= max(self.n_prefix, 1)
            chosen = chosen & (~in_front | decision)
        chosen[:, chosen.shape[1] - self.n_suffix :] = False
        return chosen

    def last(self, width: int) -> Batch:
        """Return the last ``width`` columns."""
        return replace(
            self,
            input_ids=self.input_ids[:, -width:],
            attention_mask=self.attention_mask[:, -width:],
        )

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            gold=self.gold.to(device),
        )

    def take(self, rows: Int[Tensor, " row"]) -> Batch:
        """Return the rows of these indices, in this order; one may come several times."""
        return replace(
            self,
            input_ids=self.input_ids[rows],
            attention_mask=self.attention_mask[rows],
            gold=self.gold[rows],
        )

    def rows(self, chunk: range) -> Batch:
        """Return consecutive rows."""
        return self.take(torch.arange(chunk.start, chunk.stop, device=self.input_ids.device))

    def repeat(self, times: int) -> Batch:
        """Return the rows ``times`` times over: row r of copy c is at ``c * len(self) + r``."""
        return replace(
            self,
            input_ids=self.input_ids.repeat(times, 1),
            attention_mask=self.attention_mask.repeat(times, 1),
            gold=self.gold.repeat(times),
        )


def at_least_float32(values: Tensor) -> Tensor:
    """Widen 16-bit values."""
    return values if values.dtype == torch.float64 else values.float()


def margin(
    labels: Float[Tensor, "*batch label"], gold: Int[Tensor, " batch"]
) -> Float[Tensor, "*batch"]:
    """Task margin: score of the right label minus the mean of the others.

    Args:
        labels: scores of the labels; the last axis but one is that of the examples.
        gold: index of the right label of every example.
    """
    index = gold.expand(labels.shape[:-1])[..., None]
    right = labels.gather(-1, index)[..., 0]
    return right - (labels.sum(-1) - right) / (labels.shape[-1] - 1)


def task_margin(logits: Float[Tensor, "batch d_out"], batch: Batch) -> Float[Tensor, " batch"]:
    """Task margin of every example from all outputs of the head."""
    return margin(batch.readout.of_labels(logits), batch.gold)
