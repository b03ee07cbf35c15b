"""Running a language model's head on the last columns only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from circuitlens.models.batch import Views

__all__ = ["last_columns"]


@contextmanager
def last_columns(
    model: Views, head: nn.Module, width: int, n_suffix: int
) -> Iterator[dict[str, Any]]:
    """Let the head see ``width`` columns before the suffix; yield arguments that ask for it.

    A row of the size of the vocabulary for every token would be pure memory. The output has these
    columns first (models that take ``logits_to_keep`` append those of the suffix).
    """
    if "logits_to_keep" in model.accepted:
        yield {"logits_to_keep": width + n_suffix}
        return

    def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        stop = inputs[0].shape[1] - n_suffix
        return inputs[0][:, stop - width : stop]

    handle = head.register_forward_pre_hook(select)
    try:
        yield {}
    finally:
        handle.remove()
