"""Token batches, where their answers are read, and the task margin of the answers.

:class:`Readout` is what the rest of the package knows of answers; the kinds of readout are in
:mod:`circuitlens.models.readouts`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from circuitlens.errors import check_choice
from circuitlens.models.families import ActivationSite, Family
from circuitlens.models.features import Features
from circuitlens.models.hooks import Hook
from circuitlens.models.tokens import PromptText

__all__ = [
    "Answers",
    "Batch",
    "Frame",
    "Plan",
    "Positions",
    "Readout",
    "Views",
    "Words",
    "at_least_float32",
    "from_the_end",
    "margin",
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
        place: between the prompt and what answers it: the beginning that all answers share, and
            the place that answers have in masked language models, ``[MASK]``.
        behind: that belong to no text, such as ``[SEP]``.
        between: of two texts that are in no prompt, such as ``[SEP]``.
    """

    before: tuple[int, ...]
    place: tuple[int, ...]
    behind: tuple[int, ...]
    between: tuple[int, ...] = ()


# The answer word of a label, or several that mean the same.
Words = str | tuple[str, ...] | list[str]
# Tokens of the words of every label of one example.
Answers = tuple[tuple[tuple[int, ...], ...], ...]


class Plan(NamedTuple):
    """How the answers of one example are laid out.

    Attributes:
        continuations: tokens after the prompt, for every row.
        entries: what is read: row, column counted from the end of the row (−1 is the last token
            before the suffix), token, label, and number of the word among those of the label.
    """

    continuations: tuple[tuple[int, ...], ...]
    entries: tuple[tuple[int, int, int, int, int], ...]


class Readout(ABC):
    """Where the answers of a batch are read, and the scores of the labels there.

    The only home of this knowledge: what token stands for a label, which column is read, what the
    model's head is. A batch carries the readout of its task; :attr:`HookedModel.readout` is the one
    of the model, which knows no labels yet. Readouts are compared by value and have a short repr
    that tells them apart, as checkpoints name them.

    Attributes:
        name: of the kind, such as ``token``.
        prompted: the texts are in a prompt that a word answers; else they are given alone.
        vocabulary: :meth:`logits` are those of a vocabulary's tokens.
        pad_right: padding comes after the prompts, because the first column is read.
    """

    name: str
    prompted = True
    vocabulary = False
    pad_right = False

    @property
    @abstractmethod
    def n_labels(self) -> int:
        """Number of labels; 0 before :meth:`for_labels`."""

    # -- prompts -------------------------------------------------------------------------------

    @abstractmethod
    def for_labels(
        self, prompt: PromptText, words: Mapping[str, Words], kind: str = "auto"
    ) -> Readout:
        """Return the readout of these labels.

        Args:
            prompt: an example of what comes before the answer.
            words: answer word, or words, by label; their order numbers the labels.
            kind: the name of a kind of readout, or ``"auto"`` for the simplest that tells the
                labels apart.

        Raises:
            InputError: if the labels cannot be told apart by their words, or a model of this kind
                has no such readout.
        """

    @abstractmethod
    def for_choices(
        self, tokenizer: PreTrainedTokenizerBase, n_choices: int, mean: bool = False
    ) -> Readout:
        """Return the readout of answers that every example brings itself.

        Raises:
            InputError: if a model of this kind has no such readout.
        """

    @abstractmethod
    def frame(self, tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> Frame:
        """Tokens that the model expects around a prompt.

        Args:
            tokenizer: of the model.
            bos: whether a causal prompt begins with ``<s>``; ``None`` is as the tokenizer does it.

        Raises:
            InputError: if the tokenizer lacks one of them.
        """

    def plan(self, answers: Answers) -> Plan:
        """Lay the answers of one example out in rows; of most readouts there is nothing to do."""
        return Plan(((),), ())

    @abstractmethod
    def where(self, batch: Batch) -> Bool[Tensor, "row pos"]:
        """Positions at which the answer is read."""

    # -- scores --------------------------------------------------------------------------------

    @abstractmethod
    def logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch d_out"]:
        """All outputs where the answer is read, from the hooked view.

        Of a language model's head these are logits of the vocabulary, where one position decides;
        else scores of the classes or labels.
        """

    @abstractmethod
    def label_logits(
        self, model: Views, batch: Batch, hooks: Mapping[str, Hook]
    ) -> Float[Tensor, "batch label"]:
        """Score of every label from the hooked view, in at least float32."""

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
        """Pick the scores of the labels out of all outputs, in at least float32."""

    def output_names(self, labels: Sequence[str]) -> Sequence[str] | None:
        """Names of all outputs of :meth:`logits`; ``None`` if these are tokens of a vocabulary."""
        return None if self.vocabulary else labels

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

    def predicts_text(self) -> bool:
        """Whether the model predicts the next token of any text."""
        return False


@dataclass(frozen=True)
class Batch:
    """Padded prompts, a row for each, or several rows in turn for the answers of one.

    Padding is on the left, unless the readout looks at the first token.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on prompt tokens, 0 on padding.
        gold: index of the right label, for every example.
        readout: says where the answer is read.
        n_prefix: tokens at the start of each prompt that belong to no text (1 for ``<s>``).
        n_suffix: tokens at the end of each prompt that belong to no text (1 for ``[SEP]``).
        n_rows: rows of each example, which follow each other. Their prompt is the same, and the
            beginnings of answers that follow it differ.
        reading: what is read in the rows of each example (:class:`Plan`); entries of label −1 fill
            up.
        tail: tokens of each row that are the beginning of an answer.
        partner: prompts whose activations stand in for those of these, row by row, where heads are
            not measured from means (:class:`circuitlens.baseline.PairedMeans`).
        values, places: features of sounds and images, and the positions where they stand instead
            of the embeddings of tokens (:mod:`circuitlens.models.composite`).
    """

    input_ids: Int[Tensor, "row pos"]
    attention_mask: Int[Tensor, "row pos"]
    gold: Int[Tensor, " batch"]
    readout: Readout
    n_prefix: int = 0
    n_suffix: int = 0
    n_rows: int = 1
    reading: Int[Tensor, "batch entry 5"] | None = None
    tail: Int[Tensor, " row"] | None = None
    partner: Batch | None = None
    values: Float[Tensor, "row pos d_model"] | None = None
    places: Bool[Tensor, "row pos"] | None = None

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def position_ids(self) -> Int[Tensor, "row pos"]:
        """Positions counted from the first prompt token, so that padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the name of their attribute."""
        found = {name: getattr(self, name) for name in _TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def features(self) -> Features | None:
        """Features of sounds and images, if there are any."""
        if self.values is None or self.places is None:
            return None
        return Features(self.values, self.places)

    def mask(self, positions: Positions) -> Bool[Tensor, "row pos"]:
        """Positions that a source or a mean refers to.

        ``"all"`` is every prompt token but the first, where the attention sink sits, be it ``<s>``
        or, in models without one, the first token of the text; and without what comes before the
        text or after it. A first token at which the answer is read is in. ``"all+first"`` is these
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
        if self.n_suffix:
            chosen = chosen & (from_the_end(self.attention_mask) > self.n_suffix)
        return chosen

    def once(self, mask: Bool[Tensor, "row pos"]) -> Bool[Tensor, "row pos"]:
        """Keep a prompt's positions in the first of its rows only: in the others they are equal."""
        if self.n_rows == 1 or self.tail is None:
            return mask
        place = from_the_end(self.attention_mask) - self.n_suffix
        own = (place > 0) & (place <= self.tail[:, None])
        own[:: self.n_rows] = True
        return mask & own

    def of_examples(self, values: Float[Tensor, "row *shape"]) -> Float[Tensor, "batch *shape"]:
        """Sum over the rows of each example."""
        if self.n_rows == 1:
            return values
        summed: Tensor = values.unflatten(0, (len(self), self.n_rows)).sum(1)
        return summed

    def last(self, width: int) -> Batch:
        """Return the last ``width`` columns."""
        return self._columns(lambda tensor: tensor[:, -width:])

    def without_columns(self, n: int) -> Batch:
        """Leave out the first ``n`` columns."""
        return self._columns(lambda tensor: tensor[:, n:])

    def _columns(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = [name for name in _BY_COLUMN if getattr(self, name) is not None]
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return self._each(lambda tensor, _: tensor.to(device), lambda b: b.to(device))

    def rows_of(self, examples: Int[Tensor, " example"]) -> Int[Tensor, " row"]:
        """Indices of the rows of these examples, in this order."""
        if self.n_rows == 1:
            return examples
        each = torch.arange(self.n_rows, device=examples.device)
        return (examples[:, None] * self.n_rows + each).flatten()

    def take(self, examples: Int[Tensor, " example"]) -> Batch:
        """Return the examples of these indices, in this order; one may come several times."""
        rows = self.rows_of(examples)
        return self._each(
            lambda tensor, by_row: tensor[rows if by_row else examples],
            lambda b: b.take(examples),
        )

    def part(self, chunk: range) -> Batch:
        """Return consecutive examples."""
        return self.take(torch.arange(chunk.start, chunk.stop, device=self.input_ids.device))

    def repeat(self, times: int) -> Batch:
        """Return the examples ``times`` times over, one copy of the batch after the other."""
        return self._each(
            lambda tensor, _: tensor.repeat(times, *[1] * (tensor.ndim - 1)),
            lambda b: b.repeat(times),
        )

    def _each(
        self, change: Callable[[Tensor, bool], Tensor], of_partner: Callable[[Batch], Batch]
    ) -> Batch:
        """Change every tensor, and the partner, if there is one.

        ``change`` is told whether the tensor has a row for each prompt's row.
        """
        by_row = (*_BY_COLUMN, "tail")
        changed: dict[str, Any] = {n: change(t, n in by_row) for n, t in self.tensors.items()}
        partner = None if self.partner is None else of_partner(self.partner)
        return replace(self, **changed, partner=partner)


_BY_COLUMN = ("input_ids", "attention_mask", "values", "places")
_TENSORS = (*_BY_COLUMN, "gold", "reading", "tail")


def from_the_end(attention_mask: Int[Tensor, "row pos"]) -> Int[Tensor, "row pos"]:
    """Place of every token counted from the end of its prompt, whose last token is number 1."""
    place: Tensor = attention_mask.flip(-1).cumsum(-1).flip(-1)
    return place


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
