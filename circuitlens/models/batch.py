"""Token batches, and the task margin of what a model answers to them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from circuitlens.errors import check_choice

__all__ = ["Batch", "Positions", "at_least_float32", "label_logits", "margin", "task_margin"]

Positions = Literal["all", "decision"]


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts. The decision position is the same column in every row.

    In causal models it is the last token; in masked language models it is the mask, which a few
    tokens such as ``[SEP]`` follow.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on prompt tokens, 0 on padding.
        gold: index of the right label in ``label_tokens``, for every row.
        label_tokens: the token of every label.
        n_prefix: tokens at the start of each prompt that belong to no text (1 for ``<s>``).
        n_suffix: tokens behind the decision position (1 for ``[SEP]``).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    gold: Int[Tensor, " batch"]
    label_tokens: Int[Tensor, " label"]
    n_prefix: int = 0
    n_suffix: int = 0

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def decision(self) -> int:
        """Column of the decision position, counted from the end: −1 is the last token."""
        return -1 - self.n_suffix

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions counted from the first prompt token, so that padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def mask(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Positions that a source or a mean speaks of.

        ``"all"`` is every prompt token but ``<s>`` in front, where the attention sink sits (its
        activations are the same for every prompt), and what follows the decision position.

        Raises:
            InputError: for other positions than these.
        """
        check_choice("positions", positions, get_args(Positions))
        if positions == "decision":
            chosen = torch.zeros_like(self.attention_mask, dtype=torch.bool)
            chosen[:, self.decision] = True
            return chosen
        chosen = (self.attention_mask.cumsum(-1) > self.n_prefix) & self.attention_mask.bool()
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
            label_tokens=self.label_tokens.to(device),
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


def label_logits(
    logits: Float[Tensor, "batch d_vocab"], batch: Batch
) -> Float[Tensor, "batch label"]:
    """Logits of the label tokens, in float32 at least."""
    return at_least_float32(logits[:, batch.label_tokens])


def at_least_float32(values: Tensor) -> Tensor:
    """Widen 16-bit values."""
    return values if values.dtype == torch.float64 else values.float()


def margin(
    labels: Float[Tensor, "*batch label"], gold: Int[Tensor, " batch"]
) -> Float[Tensor, "*batch"]:
    """Task margin: logit of the right label minus the mean of the others.

    Args:
        labels: logits of the label tokens; the last axis but one is that of the examples.
        gold: index of the right label of every example.
    """
    index = gold.expand(labels.shape[:-1])[..., None]
    right = labels.gather(-1, index)[..., 0]
    return right - (labels.sum(-1) - right) / (labels.shape[-1] - 1)


def task_margin(logits: Float[Tensor, "batch d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Task margin of every example from the logits of the whole vocabulary."""
    return margin(label_logits(logits, batch), batch.gold)
