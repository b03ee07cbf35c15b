"""Token batches, and the task margin of what a model answers to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Batch", "Positions", "label_logits", "task_margin"]

Positions = Literal["all", "decision"]


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts. The decision position is the last token of every row.

    Attributes:
        input_ids: token ids.
        attention_mask: 1 on prompt tokens, 0 on padding.
        gold: index of the right label in ``label_tokens``, for every row.
        label_tokens: the token of every label.
        n_prefix: tokens at the start of each prompt that belong to no text (1 for ``<s>``).
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]
    gold: Int[Tensor, " batch"]
    label_tokens: Int[Tensor, " label"]
    n_prefix: int = 0

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def position_ids(self) -> Int[Tensor, "batch pos"]:
        """Positions counted from the first prompt token, so that padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    def mask(self, positions: Positions) -> Bool[Tensor, "batch pos"]:
        """Positions that a source or a mean speaks of.

        ``"decision"`` is the last token; ``"all"`` is every prompt token but ``<s>``, where the
        attention sink sits: its activations are the same for every prompt.
        """
        if positions == "decision":
            chosen = torch.zeros_like(self.attention_mask, dtype=torch.bool)
            chosen[:, -1] = True
            return chosen
        return (self.attention_mask.cumsum(-1) > self.n_prefix) & self.attention_mask.bool()

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.gold.to(device),
            self.label_tokens.to(device),
            self.n_prefix,
        )

    def repeat(self, times: int) -> Batch:
        """Return the rows ``times`` times over: row r of copy c is at ``c * len(self) + r``."""
        return Batch(
            self.input_ids.repeat(times, 1),
            self.attention_mask.repeat(times, 1),
            self.gold.repeat(times),
            self.label_tokens,
            self.n_prefix,
        )


def label_logits(
    logits: Float[Tensor, "batch d_vocab"], batch: Batch
) -> Float[Tensor, "batch label"]:
    """Logits of the label tokens, in float32 at least."""
    chosen = logits[:, batch.label_tokens]
    return chosen if chosen.dtype == torch.float64 else chosen.float()


def task_margin(logits: Float[Tensor, "batch d_vocab"], batch: Batch) -> Float[Tensor, " batch"]:
    """Task margin of every example: logit of the right label minus the mean of the others."""
    labels = label_logits(logits, batch)
    gold = labels.gather(1, batch.gold[:, None])[:, 0]
    return gold - (labels.sum(1) - gold) / (labels.shape[1] - 1)
