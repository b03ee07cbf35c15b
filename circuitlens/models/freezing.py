"""Which parameters gradients reach, and whether there is dropout: for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluating", "gradients"]


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block; then every module is again in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
