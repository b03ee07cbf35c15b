"""Which parameters gradients reach."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["gradients"]


@contextmanager
def gradients(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Within the block, gradients reach all parameters, or none; then it is as it was before."""
    changed = [p for p in model.parameters() if p.requires_grad != wanted]
    try:
        for parameter in changed:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted)
