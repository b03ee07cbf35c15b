"""Retention on text: what an adapted model still makes of plain text in the source language.

A label needs one token; a language model that keeps its accuracy can have lost its language. The
next-token loss on held-out texts shows it, and no label is needed for it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from circuitlens.models.hooked import HookedModel
from circuitlens.models.passes import count_forward
from circuitlens.tasks import Task

__all__ = ["MAX_TEXTS", "text_loss"]

# A mean over some thousands of tokens is steady, and every cell of a grid takes it.
MAX_TEXTS = 100
_BATCH = 8


@torch.no_grad()
def text_loss(model: HookedModel, task: Task, pool: str = "test") -> float | None:
    """Return the mean next-token loss on the texts of a pool, without prompt or label.

    Args:
        model: a causal language model.
        task: gives texts: all fields of an example, one after the other, cut to the task's
            ``max_text_tokens``; at most 100 examples, the first ones of the pool.
        pool: name of the pool.

    Returns:
        Nats per token; ``None`` for models that predict no next token (encoders,
        classifiers), and where no text has two tokens.
    """
    if not model.readout.predicts_text():
        return None
    tokenizer = model.tokenizer
    texts = [" ".join(e.texts.values()) for e in task[pool][:MAX_TEXTS]]
    rows = [tokenizer(text)["input_ids"][: task.max_text_tokens] for text in texts]
    if tokenizer.bos_token_id is not None:
        # So that the first token of a text is predicted too.
        bos = tokenizer.bos_token_id
        rows = [row if row[:1] == [bos] else [bos, *row] for row in rows]
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    if not rows:
        return None
    total, count = 0.0, 0
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        width = max(map(len, part))
        ids = torch.zeros(len(part), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for n, row in enumerate(part):
            ids[n, : len(row)] = torch.tensor(row)
            mask[n, : len(row)] = 1
        losses = _losses(model, ids.to(model.device), mask.to(model.device))
        total += float(losses.sum())
        count += int(mask[:, 1:].sum())
    return total / count


def _losses(model: HookedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Losses of all tokens but the first, 0 on padding at the right."""
    count_forward(len(ids))
    said = model.hf(input_ids=ids, attention_mask=mask).logits.float()
    following = ids.roll(-1, dims=1)
    losses = F.cross_entropy(said.transpose(1, 2), following, reduction="none")
    # The last place of a row is followed by nothing.
    counts = mask.roll(-1, dims=1)
    counts[:, ids.shape[1] - 1] = 0
    return losses.double() * counts
