"""Merging: one plain model of what was trained, in few bits again, and what that costs.

In 16 bits a transfer keeps what it trained alongside the weights, in float32: merging rounds every
sum, a norm's weight near 1 has 8 bits in bfloat16, and moves by less than the last of them. So
merging is a separate step, which measures what it changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from circuitlens.adapt.trainable import Trainable
from circuitlens.errors import MODEL, TASK, InputError, check_types
from circuitlens.models.hooked import HookedModel
from circuitlens.models.loading import find_dtype
from circuitlens.tasks import Example, Task
from circuitlens.tasks.evaluation import label_scores

__all__ = ["Merged", "merge", "plain_copy"]


@dataclass(frozen=True)
class Merged:
    """A plain model, and how its answers differ from those of the model that it was made of.

    Attributes:
        model: without an adapter, so that hooks, ``model.save`` and any library can use it.
        dtype: of its weights, such as ``"bfloat16"``.
        n: number of examples that were answered before and after.
        logit_change, largest_logit_change: mean and largest absolute difference of a label's logit.
        changed: how many examples are answered differently.
        accuracy_before, accuracy_after: on these examples.
    """

    model: HookedModel = field(repr=False, compare=False)
    dtype: str
    n: int
    logit_change: float
    largest_logit_change: float
    changed: int
    accuracy_before: float
    accuracy_after: float

    def __str__(self) -> str:
        return (
            f"Merged into {self.dtype}: label logits move by {self.logit_change:.2g} "
            f"(at most {self.largest_logit_change:.2g}), {self.changed} of {self.n} answers "
            f"change, accuracy {self.accuracy_before:.1%} before and {self.accuracy_after:.1%} "
            "after."
        )


def merge(
    model: HookedModel,
    task: Task,
    examples: Sequence[Example] | str = "test",
    *,
    dtype: torch.dtype | str | None = None,
    quiet: bool = False,
) -> Merged:
    """Merge an adapter into its weights, or round weights, and measure what that changes.

    Args:
        model: what :func:`circuitlens.transfer` or :func:`circuitlens.load` gave; left as it is.
        task: the one that it was adapted to.
        examples: what to measure on: examples, or the name of a pool of the task.
        dtype: of the merged weights, such as ``"bfloat16"``; by default that of the weights that
            are not trained.
        quiet: no progress bar.

    Returns:
        The plain model with the change of its label logits, in logits, and of its accuracy.

    Raises:
        InputError: for missing examples, or a type that weights cannot have.
    """
    check_types("merge", model=(model, HookedModel, MODEL), task=(task, Task, TASK))
    kind = model.dtype if dtype is None else find_dtype(dtype)
    if not isinstance(kind, torch.dtype):
        raise InputError("merge needs a definite type: give dtype='bfloat16', or leave it out.")
    encoded = task.encode(model, examples)
    before = label_scores(model, encoded, quiet=quiet)
    plain = plain_copy(model, kind)
    after = label_scores(plain, encoded, quiet=quiet)
    moved = (after - before).abs()
    gold = torch.tensor(encoded.gold)
    answers = before.argmax(1), after.argmax(1)
    return Merged(
        model=plain,
        dtype=str(kind).removeprefix("torch."),
        n=len(encoded),
        logit_change=float(moved.mean()),
        largest_logit_change=float(moved.max()),
        changed=int((answers[0] != answers[1]).sum()),
        accuracy_before=float((answers[0] == gold).double().mean()),
        accuracy_after=float((answers[1] == gold).double().mean()),
    )


def plain_copy(model: HookedModel, kind: torch.dtype | None = None) -> HookedModel:
    """Return a copy of one type, its adapter, if it holds one, merged into the weights."""
    copy = model.clone()
    kind = kind or copy.dtype
    wider = torch.promote_types(copy.dtype, kind)
    if wider != copy.dtype:
        # First, so that sums are rounded once.
        copy.hf.to(wider)
    plain = copy if copy.adapter is None else Trainable(copy).merged()
    plain.hf.to(kind)
    return plain
